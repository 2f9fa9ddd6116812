"""vLLM on a CPU, as a peer of `ganglion bench decode` and `prefill`. Run by the python of .peers/vllm.

One process, no prefix cache, pages for exactly the workload, greedy, bfloat16; compiled as vLLM does by default.
"""

import importlib
import json
import math
import os
import sys
import time
from typing import Any

VALUE_BYTES = 2  # of bfloat16
SPARE_TOKENS = 128  # a row's last page is not full


def main() -> None:
    """Load, then answer until the input ends."""
    settings = json.loads(sys.argv[1])
    # compiled programs print to our standard output: answers get a copy of it, everything else goes to the error stream
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_CPU_KVCACHE_SPACE": str(kv_gib(settings)),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    if settings["num_threads"] >= (os.cpu_count() or 1):
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{settings['num_threads'] - 1}"
    vllm: Any = importlib.import_module("vllm")
    engine = vllm.LLM(
        model=settings["folder"],
        dtype="bfloat16",
        skip_tokenizer_init=True,
        max_model_len=settings["max_tokens"],
        max_num_seqs=settings["max_rows"],
        max_num_batched_tokens=max(2048, settings["max_tokens"]),
        enable_prefix_caching=False,
        seed=0,
    )
    tell(answers, version=vllm.__version__)
    for line in sys.stdin:
        request = json.loads(line)
        num_tokens = request["num_tokens"]
        sampling = vllm.SamplingParams(
            temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False
        )
        prompts = [{"prompt_token_ids": prompt} for prompt in request["prompts"]]
        start_s = time.monotonic()
        outputs = engine.generate(prompts, sampling, use_tqdm=False)
        seconds = time.monotonic() - start_s
        counts = [len(output.outputs[0].token_ids) for output in outputs]
        tell(answers, seconds=seconds, num_tokens=counts)


def kv_gib(settings: dict[str, Any]) -> int:
    """GiB of pages for the whole workload, rounded up."""
    with open(os.path.join(settings["folder"], "config.json")) as file:
        config = json.load(file)
    numbers = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
    tokens = settings["max_rows"] * (settings["max_tokens"] + SPARE_TOKENS)
    num_bytes = float(numbers * VALUE_BYTES * tokens)
    return math.ceil(num_bytes / 2**30) + 1


def tell(answers: Any, **facts: Any) -> None:
    """One line that the other side takes for an answer."""
    answers.write(json.dumps({"ganglion_peer": "vllm", **facts}) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
