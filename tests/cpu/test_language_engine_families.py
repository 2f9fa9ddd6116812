"""The engine over pages against transformers, for every family: windows, latents, sinks, softcaps, experts.

A mixed batch with a shared prefix in a pool that is too small for it: prompts are cut, rows preempted and prefixes
found, and still the tokens and the scores are transformers'.
"""

from pathlib import Path

import pytest
import torch

from ganglion.engine.language_policy import POLICIES
from ganglion.generation import PromptScored
from ganglion.models.decoder_load import load_language
from tests.cpu.language_toy import Stand
from tests.cpu.test_decoder import BASE, CASES, saved

NUM_NEW = 64
LENGTHS = (40, 3, 28, 17, 33)


@pytest.mark.parametrize("case", CASES)
def test_equal_to_transformers(case: str, tmp_path: Path) -> None:
    theirs = saved(tmp_path, case)
    page_bytes = 4096
    ours = load_language(tmp_path, dtype=torch.float32, name="m", max_page_bytes=page_bytes)
    generator = torch.Generator().manual_seed(1)
    shared = torch.randint(3, BASE["vocab_size"], (max(LENGTHS),), generator=generator).tolist()
    prompts = [[*shared[: length - 2], length, length + 1] for length in LENGTHS]
    # what the longest request needs by itself, and a little
    num_larges = 2 * sum(group.layout.num_pages(110) for group in ours.groups)
    policy = list(POLICIES.values())[len(case) % len(POLICIES)]
    stand = Stand(
        ours,  # type: ignore[arg-type]
        num_large_pages=num_larges,
        large_page_bytes=page_bytes,
        policy=policy,
        max_rows=6,
        max_batch_tokens=20,
    )
    for at, prompt in enumerate(prompts):
        stand.submit(
            at,
            prompt,
            model="m",
            max_tokens=NUM_NEW,
            num_choices=1 + at % 2,
            num_prompt_logprobs=0 if at == 2 else None,
        )
    for _ in range(4):  # where windows make pages last, nobody is preempted for want of them
        for _ in range(12):
            stand.step()
        stand.engine.preempt_latest()
    stand.run()
    stand.check_empty()
    assert stand.engine.num_preemptions > 0
    for at, prompt in enumerate(prompts):
        assert stand.tokens[at, 0] == stand.tokens[at, at % 2]
        tokens = [*prompt, *stand.tokens[at, 0]]
        with torch.inference_mode():
            logits = theirs(torch.tensor([tokens])).logits[0]
        # greedy: each token is the best after all before it
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == tokens[len(prompt) :]
        if at == 2:
            (scored,) = stand.others
            assert isinstance(scored, PromptScored)
            want = logits.log_softmax(-1)
            for place, score in enumerate(scored.logprobs[1:], 1):
                assert score is not None
                assert score.logprob == pytest.approx(
                    float(want[place - 1, prompt[place]]), abs=1e-3
                )
