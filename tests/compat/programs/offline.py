import sys

from vllm import LLM, SamplingParams

MODEL = sys.argv[1]

prompts = [
    "Hello, my name is",
    "The president of the United States is",
    "The capital of France is",
    "The future of AI is",
]
sampling_params = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=8)


def main():
    llm = LLM(model=MODEL, gpu_memory_utilization=0.5, swap_space=4, enforce_eager=True, max_model_len=256)
    found = []
    for output in llm.generate(prompts, sampling_params):
        prompt = output.prompt
        generated_text = output.outputs[0].text
        print(f"Prompt: {prompt!r}, Generated text: {generated_text!r}")
        found.append((prompt, generated_text, output.outputs[0].token_ids))
    return found


if __name__ == "__main__":
    RESULT = main()
