"""A client of an engine that runs already.

    flexgen-lite launch --model DIR                                   # prints the endpoint
    python examples/client.py ipc:///.../engine.sock "A prompt" "Another one"

Several clients at once share the engine fairly; one that goes takes its requests with it.
"""

from __future__ import annotations

import argparse

from flexgen_lite import Client, SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("endpoint")
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--key-file", help="of an engine on tcp://")
    args = parser.parse_args()

    with Client(args.endpoint, key_file=args.key_file) as client:
        print(f"model: {client.welcome.model}, sequences up to {client.welcome.max_length} tokens")

        job = client.submit(args.prompts, SamplingParams(max_tokens=args.max_tokens, temperature=0.0))
        for completion in job:
            answer = completion.error if completion.error is not None else completion.text
            print(f"{completion.index}: {answer!r}")

        print("as it comes: ", end="")
        for delta in client.stream(args.prompts[0], SamplingParams(max_tokens=args.max_tokens, temperature=0.0)):
            print(delta.text, end="", flush=True)
        print()

        status = client.status()
        print(f"the engine has generated {status.totals['generated_tokens']:.0f} tokens in all")


if __name__ == "__main__":
    main()
