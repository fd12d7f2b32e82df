from vllm import LLM

llm = LLM(model="Qwen/Qwen3-Reranker-0.6B", task="score", enforce_eager=True)

query = "What is the capital of France?"
documents = ["The capital of Brazil is Brasilia.", query]
outputs = llm.score(query, documents)
for document, output in zip(documents, outputs, strict=True):
    print(document == query, output.outputs.score > 0.999)
(output,) = llm.score(query, query)
print(f"{output.outputs.score:.2f}")
