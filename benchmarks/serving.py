"""Tokens per second that a server of OpenAI's interface gives to several clients at once.

    sambalm serve runs/demo
    python benchmarks/serving.py --model runs/demo --clients 1 8 16

It takes any such server, vLLM's too. Every client asks for one text, which goes on after the end of a text.
"""

import argparse
import time
from concurrent.futures import ThreadPoolExecutor

from openai import OpenAI


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", required=True, help="the model's name there")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=200, help="of each text")
    parser.add_argument("--prompt", default="def main(")
    arguments = parser.parse_args()
    client = OpenAI(base_url=arguments.url, api_key="none", max_retries=0)

    def tokens(seed: int) -> int:
        options = {"prompt": arguments.prompt, "max_tokens": arguments.tokens, "seed": seed}
        answer = client.completions.create(model=arguments.model, **options, extra_body={"ignore_eos": True})
        return answer.usage.completion_tokens

    tokens(0)  # what a first request takes longer for is no part of it
    for clients in arguments.clients:
        began_s = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            made = sum(pool.map(tokens, range(clients)))
        print(f"{clients:3} clients: {made / (time.perf_counter() - began_s):,.0f} tokens/s")


if __name__ == "__main__":
    main()
