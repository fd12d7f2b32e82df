#!/bin/sh
cat > requests.jsonl <<'LINES'
{"custom_id": "request-1", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "HuggingFaceTB/SmolLM2-135M-Instruct", "messages": [{"role": "system", "content": "You are a helpful assistant."}, {"role": "user", "content": "Hello world!"}], "max_completion_tokens": 10}}
{"custom_id": "request-2", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "HuggingFaceTB/SmolLM2-135M-Instruct", "messages": [{"role": "user", "content": "Hello world!"}], "max_completion_tokens": 10, "stream": true}}
{"custom_id": "request-3", "method": "POST", "url": "/v1/completions", "body": {"model": "HuggingFaceTB/SmolLM2-135M-Instruct", "prompt": ["Once", "Twice"], "max_tokens": 4}}
{"custom_id": "request-4", "method": "POST", "url": "/v1/embeddings", "body": {"model": "HuggingFaceTB/SmolLM2-135M-Instruct", "input": "You are a helpful assistant."}}
{"custom_id": "request-5", "method": "POST", "url": "/v1/score", "body": {"model": "HuggingFaceTB/SmolLM2-135M-Instruct", "queries": "What is the capital of France?", "documents": ["Paris.", "What is the capital of France?"]}}
{"custom_id": "request-6", "method": "POST", "url": "/v1/rerank", "body": {"model": "HuggingFaceTB/SmolLM2-135M-Instruct", "query": "What is the capital of France?", "documents": ["Paris.", "What is the capital of France?"]}}
{"custom_id": "request-7", "method": "POST", "url": "/v1/responses", "body": {"model": "HuggingFaceTB/SmolLM2-135M-Instruct", "input": "Hello world!", "max_output_tokens": 4}}
{"custom_id": "request-8", "method": "POST", "url": "/v1/messages", "body": {"model": "HuggingFaceTB/SmolLM2-135M-Instruct", "messages": [{"role": "user", "content": "Hello world!"}], "max_tokens": 4}}
LINES
vllm run-batch -i requests.jsonl -o results.jsonl --model HuggingFaceTB/SmolLM2-135M-Instruct \
    --disable-log-stats --response-role assistant --max-num-seqs 4 --enforce-eager
