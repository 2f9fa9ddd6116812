"""OpenVINO GenAI, as a peer of `ganglion bench decode` and `prefill`. Run by the python of .peers/openvino.

The folder is converted once, beside itself, with weights in 16 bits; it computes in bfloat16. No tokenizer: ids in, ids out.
"""

import importlib
import json
import os
import shutil
import sys
import time
from typing import Any


def main() -> None:
    """Convert, load, then answer until the input ends."""
    settings = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")  # everything else that is printed goes to the error stream
    os.dup2(2, 1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    folder = converted(settings["folder"])
    openvino: Any = importlib.import_module("openvino")
    genai: Any = importlib.import_module("openvino_genai")
    numpy: Any = importlib.import_module("numpy")
    hints = {
        "INFERENCE_PRECISION_HINT": "bf16",
        "INFERENCE_NUM_THREADS": settings["num_threads"],
        "PERFORMANCE_HINT": "LATENCY",
    }
    pipeline = genai.LLMPipeline(folder, "CPU", **hints)
    tell(answers, version=genai.__version__)
    for line in sys.stdin:
        request = json.loads(line)
        config = genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = request["num_tokens"]
        config.do_sample = False
        config.ignore_eos = True
        config.set_eos_token_id(0)  # there is no tokenizer to ask
        ids = numpy.array(request["prompts"], dtype=numpy.int64)
        inputs = genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(numpy.ones_like(ids)))
        start_s = time.monotonic()
        outputs = pipeline.generate(inputs, config)
        seconds = time.monotonic() - start_s
        tell(answers, seconds=seconds, num_tokens=[len(tokens) for tokens in outputs.tokens])


def converted(folder: str) -> str:
    """The folder as OpenVINO reads it, made when it is not there."""
    target = f"{folder.rstrip('/')}-openvino"
    if os.path.isfile(os.path.join(target, "openvino_model.xml")):
        return target
    scratch = f"{target}.{os.getpid()}"
    optimum: Any = importlib.import_module("optimum.intel")
    model = optimum.OVModelForCausalLM.from_pretrained(
        folder, export=True, load_in_8bit=False, compile=False
    )
    model.save_pretrained(scratch)
    shutil.rmtree(target, ignore_errors=True)
    os.rename(scratch, target)
    return target


def tell(answers: Any, **facts: Any) -> None:
    """One line that the other side takes for an answer."""
    answers.write(json.dumps({"ganglion_peer": "openvino", **facts}) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
