"""`/v1/embeddings` with OpenAI's client and langchain's, over a real model: vectors of length 1, those of transformers."""

import numpy as np
import openai
import pytest
import torch
import transformers

from tests.e2e.command import Running
from tests.language_folder import MAX_TOKENS, write_llama

MODEL, WIDTH = "tiny-llama", 64
TEXTS = ["open the drawer", "close it", "x" * 300]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("models") / MODEL, width=WIDTH)


@pytest.fixture(scope="module")
def client(folder):
    line = ("serve", f"chat={folder},on_demand", "--port", "0", "--dtype", "float32")
    with Running(*line, "--arena-bytes", "64 MiB", until="Ctrl-C stops") as server:
        url = server.find(r"OpenAI +(\S+)")
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as it:
            yield it


@pytest.fixture(scope="module")
def hidden(folder):
    model = transformers.LlamaModel.from_pretrained(folder, dtype=torch.float32)

    def of(text):
        with torch.inference_mode():
            return model(torch.tensor([list(text.encode())])).last_hidden_state[0].numpy()

    return of


def unit(vector):
    return vector / np.linalg.norm(vector)


@pytest.mark.parametrize(
    "encoding", [{}, {"encoding_format": "float"}]
)  # by default it asks for base64
def test_vectors_are_those_of_transformers(client, hidden, encoding):
    answer = client.embeddings.create(model=MODEL, input=TEXTS, **encoding)
    assert [one.index for one in answer.data] == [0, 1, 2]
    for text, one in zip(TEXTS, answer.data, strict=True):
        assert np.linalg.norm(one.embedding) == pytest.approx(1.0, abs=1e-5)
        np.testing.assert_allclose(one.embedding, unit(hidden(text)[-1]), atol=1e-4)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(len, TEXTS))


def test_mean_pooling_tokens_and_fewer_dimensions(client, hidden):
    ids = list(b"open the drawer")
    answer = client.embeddings.create(
        model=MODEL, input=ids, dimensions=16, extra_body={"pooling": "mean"}
    )
    (one,) = answer.data
    wanted = unit(hidden("open the drawer").mean(0)[:16])
    np.testing.assert_allclose(one.embedding, wanted, atol=1e-4)
    both = client.embeddings.create(model=MODEL, input=[ids, ids[:3]])
    assert len(both.data) == 2


def test_more_inputs_than_may_wait_at_once(client):
    answer = client.embeddings.create(model=MODEL, input=[f"{n}" for n in range(600)])
    vectors = np.array([one.embedding for one in answer.data])
    assert vectors.shape == (600, WIDTH)
    alone = client.embeddings.create(model=MODEL, input="417").data[0].embedding
    np.testing.assert_allclose(vectors[417], alone, atol=1e-5)


@pytest.mark.parametrize(
    ("asked", "what"),
    [
        ({"input": ""}, "at least one token"),
        ({"input": []}, "token ids"),
        ({"input": ["a", 3]}, r"input\[1\]"),
        ({"input": [3, "a"]}, r"input\[1\]"),
        ({"input": [9999]}, "9999"),
        ({"input": "x", "dimensions": WIDTH + 1}, "dimensions"),
        ({"input": "x", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "x", "extra_body": {"pooling": "max"}}, "pooling"),
        ({"input": "x" * (MAX_TOKENS + 1)}, "maximum context length is 1024"),
    ],
)
def test_what_cannot_be_is_named(client, asked, what):
    with pytest.raises(openai.BadRequestError, match=what):
        client.embeddings.create(model=MODEL, **asked)


def test_langchain_embeds_documents(client):
    embeddings = pytest.importorskip("langchain_openai").OpenAIEmbeddings(
        model=MODEL, base_url=str(client.base_url), api_key="none", check_embedding_ctx_length=False
    )
    first, second = embeddings.embed_documents(["open the drawer", "close it"])
    assert len(first) == len(second) == WIDTH
    assert embeddings.embed_query("open the drawer") == pytest.approx(first, abs=1e-5)
