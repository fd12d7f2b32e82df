import json
from enum import StrEnum

from pydantic import BaseModel
from vllm import LLM, SamplingParams
from vllm.sampling_params import StructuredOutputsParams

MAX_TOKENS = 60
choice = SamplingParams(structured_outputs=StructuredOutputsParams(choice=["Positive", "Negative"]))
regex = SamplingParams(
    structured_outputs=StructuredOutputsParams(regex=r"\w{1,9}@\w{1,9}\.com\n"),
    stop=["\n"],
    max_tokens=MAX_TOKENS,
)


class CarType(StrEnum):
    SEDAN = "SEDAN"
    SUV = "SUV"


class CarDescription(BaseModel):
    year: int
    car_type: CarType


schema = SamplingParams(
    structured_outputs=StructuredOutputsParams(json=CarDescription.model_json_schema()),
    max_tokens=MAX_TOKENS,
    temperature=0.0,
)
llm = LLM(
    model="Qwen/Qwen2.5-3B-Instruct",
    max_model_len=100,
    structured_outputs_config={"backend": "auto"},
)
print(llm.generate("Classify this sentiment: vLLM is wonderful!", choice)[0].outputs[0].text)
print(llm.generate("Generate an e-mail address:", sampling_params=regex)[0].outputs[0].text)
text = llm.generate("Generate a JSON of a car:", sampling_params=schema)[0].outputs[0].text
print(text[:1], json.dumps("year" in text))
