import asyncio
import json

from flows import failure_of, flow, main
from lorax import AsyncClient, Client
from lorax.types import MergedAdapters

schema = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "breakfast": {"type": "boolean"}},
    "required": ["city", "breakfast"],
    "additionalProperties": False,
}


def client_of(given, key=None, kind=Client):
    return kind(given["url"], headers={"Authorization": f"Bearer {key or given['key']}"})


def details_of(details):
    return {
        "finish": details.finish_reason.value,
        "promptTokens": details.prompt_tokens,
        "generatedTokens": details.generated_tokens,
        "seed": details.seed,
    }


@flow
def generate(given):
    client = client_of(given)
    prompt = given["item"]["prompt"]
    answer = client.generate(prompt, adapter_id="dates", max_new_tokens=16)
    full = client.generate(prompt, adapter_id="dates", max_new_tokens=16, return_full_text=True)
    base = client.generate(prompt, max_new_tokens=4)
    events = list(client.generate_stream(prompt, adapter_id="dates", max_new_tokens=16))
    return {
        "text": answer.generated_text,
        "tokens": [token.text for token in answer.details.tokens if not token.special],
        "details": details_of(answer.details),
        "full": full.generated_text,
        "base": base.details.generated_tokens,
        "streamed": [event.token.text for event in events if not event.token.special],
        "streamText": events[-1].generated_text,
        "streamDetails": details_of(events[-1].details),
    }


@flow
def sampling(given):
    client = client_of(given)
    options = {"do_sample": True, "temperature": 1.0, "max_new_tokens": 8}
    first = client.generate("Once upon a time", **options)
    again = client.generate("Once upon a time", seed=first.details.seed, **options)
    stopped = client.generate("1, 2, 3, 4,", stop_sequences=["6"], max_new_tokens=32)
    best = client.generate("Once upon a time", best_of=2, **options)
    return {
        "first": first.generated_text,
        "again": again.generated_text,
        "stopped": stopped.details.finish_reason.value,
        "best": best.details.generated_tokens,
    }


def merged_of(given, weights, max_new_tokens, strategy="linear", **more):
    how = {"merge_strategy": strategy, "density": 1, **more}
    merged = MergedAdapters(ids=list(weights), weights=list(weights.values()), **how)
    prompt = given["item"]["prompt"]
    answer = client_of(given).generate(prompt, merged_adapters=merged, max_new_tokens=max_new_tokens)
    return answer.generated_text


@flow
def merged(given):
    return {
        "one": merged_of(given, {"dates": 1.0}, 16),
        "two": merged_of(given, {"dates": 0.5, "sql": 0.5}, 8),
        "ties": merged_of(
            given, {"dates": 1.0, "mate": 0.5}, 8, "ties", density=0.3, majority_sign_method="frequency"
        ),
        "dare": merged_of(given, {"dates": 1.0, "mate": 0.5}, 8, "dare_linear", density=0.3),
    }


@flow
def json_schema(given):
    answer = client_of(given).generate(
        "The booking as JSON:",
        response_format={"type": "json_object", "schema": schema},
        do_sample=True,
        seed=3,
        max_new_tokens=64,
    )
    return {"parsed": json.loads(answer.generated_text)}


@flow
def asynchronous(given):
    async def ask():
        client = client_of(given, kind=AsyncClient)
        prompt = given["item"]["prompt"]
        answer = await client.generate(prompt, adapter_id="dates", max_new_tokens=16)
        pieces = [
            event.token.text
            async for event in client.generate_stream(prompt, adapter_id="dates", max_new_tokens=16)
            if not event.token.special
        ]
        return {"text": answer.generated_text, "streamed": pieces}

    return asyncio.run(ask())


@flow
def embed(given):
    client = client_of(given)
    return {"vector": client.embed("a quiet room").embeddings}


@flow
def errors(given):
    client = client_of(given)
    return {
        "key": failure_of(lambda: client_of(given, "wrong").generate("hello")),
        "model": failure_of(lambda: client.generate("hello", adapter_id="nobody")),
        "stream": failure_of(lambda: list(client.generate_stream("hello", adapter_id="nobody"))),
        "long": failure_of(lambda: client.generate("word " * 9000)),
        "field": failure_of(lambda: client.generate("hello", adapter_id="dates", adapter_source="hub")),
        "classify": failure_of(lambda: client.classify("hello")),
        "classifyBatch": failure_of(lambda: client.classify_batch(["hello"])),
    }


main()
