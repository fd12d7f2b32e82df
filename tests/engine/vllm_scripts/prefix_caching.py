from vllm import LLM, SamplingParams
from vllm.v1.metrics.reader import Counter, Gauge

shared_prefix = "You are an expert school principal, skilled in managing faculty and staff. " * 8
prompts = [shared_prefix + tail for tail in ("Hello", "The capital", "The future")]
sampling_params = SamplingParams(temperature=0.0, max_tokens=2)


def main():
    llm = LLM(model="facebook/opt-125m", enable_prefix_caching=True, disable_log_stats=False)
    llm.reset_prefix_cache()
    first = llm.generate(prompts[0], sampling_params)[0]
    again = llm.generate(prompts, sampling_params)
    print(first.num_cached_tokens, all(output.num_cached_tokens > 0 for output in again))
    print(llm.llm_engine.reset_prefix_cache())
    print(llm.generate(prompts[0], sampling_params)[0].num_cached_tokens)
    for metric in llm.get_metrics():
        if isinstance(metric, Gauge) and metric.name == "vllm:num_requests_running":
            print(f"{metric.name} (gauge) = {metric.value}")
        elif isinstance(metric, Counter) and metric.name == "vllm:prefix_cache_hits":
            print(f"{metric.name} (counter) > 0: {metric.value > 0}")


if __name__ == "__main__":
    main()
