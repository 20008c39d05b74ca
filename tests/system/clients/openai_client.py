import json
import time
from typing import Literal

import openai
from flows import failure_of, flow, main
from openai import OpenAI
from pydantic import BaseModel

tools = [
    {
        "type": "function",
        "function": {
            "name": "book_room",
            "description": "Books a hotel room.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "enum": ["Paris", "Rome"]},
                    "nights": {"type": "integer", "minimum": 1, "maximum": 9},
                },
                "required": ["city", "nights"],
                "additionalProperties": False,
            },
        },
    }
]
question = [{"role": "user", "content": "Book a room in Rome for 3 nights."}]


class Booking(BaseModel):
    city: Literal["Paris", "Rome"]
    breakfast: bool


def client_of(given, key=None, **options):
    return OpenAI(base_url=f"{given['url']}/v1", api_key=key or given["key"], max_retries=0, **options)


def ask(given, **options):
    client = client_of(given)
    messages = given["item"]["messages"]
    return client.chat.completions.create(
        model="dates", messages=messages, temperature=0, seed=1, max_tokens=16, **options
    )


@flow
def models(given):
    return {"ids": [model.id for model in client_of(given).models.list()]}


@flow
def chat(given):
    answer = ask(given, logprobs=True, top_logprobs=2)
    stream = list(ask(given, stream=True, stream_options={"include_usage": True}))
    return {
        "text": answer.choices[0].message.content,
        "finish": answer.choices[0].finish_reason,
        "logprobs": [token.logprob for token in answer.choices[0].logprobs.content],
        "usage": answer.usage.total_tokens,
        "pieces": [event.choices[0].delta.content or "" for event in stream if event.choices],
        "streamUsage": stream[-1].usage.total_tokens,
    }


@flow
def completions(given):
    answer = client_of(given).completions.create(
        model="base", prompt=["One, two,", "Red, green,"], n=2, temperature=1, seed=3, max_tokens=4
    )
    return {"indices": [choice.index for choice in answer.choices], "tokens": answer.usage.completion_tokens}


@flow
def tool_calls(given):
    client = client_of(given)
    options = {
        "model": "base",
        "messages": question,
        "tools": tools,
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "temperature": 0,
        "max_tokens": 64,
    }
    choice = client.chat.completions.create(**options).choices[0]
    call = choice.message.tool_calls[0]
    with client.chat.completions.stream(**options) as stream:
        streamed = stream.get_final_completion().choices[0].message.tool_calls[0]
    result = {"role": "tool", "tool_call_id": call.id, "content": "Booked."}
    after = client.chat.completions.create(
        model="base", messages=[*question, choice.message, result], tools=tools, tool_choice="none", max_tokens=4
    )
    return {
        "finish": choice.finish_reason,
        "name": call.function.name,
        "arguments": json.loads(call.function.arguments),
        "streamed": json.loads(streamed.function.arguments),
        "after": after.choices[0].message.content,
    }


@flow
def json_schema(given):
    answer = client_of(given).chat.completions.parse(
        model="base", messages=question, response_format=Booking, temperature=1, seed=2, max_tokens=64
    )
    return {"parsed": answer.choices[0].message.parsed.model_dump()}


@flow
def embeddings(given):
    client = client_of(given)
    texts = ["a quiet room", "a loud street"]
    # The client asks for base64 unless it is told, and decodes it.
    packed = client.embeddings.create(model="base", input=texts)
    plain = client.embeddings.create(model="base", input=texts, encoding_format="float")
    adapted = client.embeddings.create(model="dates", input=texts[0])
    ids = client.post("/../tokenize", cast_to=object, body={"model": "base", "prompt": texts[0]})["tokens"]
    tokens = client.embeddings.create(model="base", input=[ids])
    short = client.embeddings.create(model="base", input=texts[0], dimensions=64)
    return {
        "packed": [each.embedding for each in packed.data],
        "plain": [each.embedding for each in plain.data],
        "adapted": adapted.data[0].embedding,
        "tokens": tokens.data[0].embedding,
        "short": short.data[0].embedding,
    }


@flow
def batch(given):
    client = client_of(given)
    messages = given["item"]["messages"]
    lines = [
        {
            "custom_id": f"{model}-line",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": model, "messages": messages, "temperature": 0, "max_tokens": 16},
        }
        for model in ["dates", "base", "nobody"]
    ]
    text = "\n".join(json.dumps(line) for line in lines)
    file = client.files.create(file=("lines.jsonl", text.encode()), purpose="batch")
    job = client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
    )
    deadline = time.monotonic() + 60
    while job.status not in ("completed", "failed", "expired", "cancelled") and time.monotonic() < deadline:
        time.sleep(0.1)
        job = client.batches.retrieve(job.id)

    def lines_of(file_id):
        return [json.loads(line) for line in client.files.content(file_id).text.splitlines()]

    return {
        "status": job.status,
        "counts": job.request_counts.model_dump(),
        "outputs": {
            line["custom_id"]: line["response"]["body"]["choices"][0]["message"]["content"]
            for line in lines_of(job.output_file_id)
        },
        "errors": [line["custom_id"] for line in lines_of(job.error_file_id)],
    }


@flow
def errors(given):
    client = client_of(given)
    create = client.chat.completions.create
    hello = [{"role": "user", "content": "hello"}]
    long = [{"role": "user", "content": "word " * 9000}]
    return {
        "key": failure_of(lambda: client_of(given, "wrong").chat.completions.create(model="base", messages=hello)),
        "model": failure_of(lambda: create(model="nobody", messages=hello)),
        "long": failure_of(lambda: create(model="base", messages=long)),
        "field": failure_of(lambda: create(model="base", messages=hello, temperature=9)),
    }


@flow
def rate_limit(given):
    """One request at a time: the second is refused; the client waits as it is told and comes again."""
    client = client_of(given, given["limitedKey"])
    hello = [{"role": "user", "content": "hello"}]
    options = {"model": "base", "messages": hello, "max_tokens": 4}
    running = client.chat.completions.create(
        model="base", messages=hello, max_tokens=4000, stream=True, extra_body={"ignore_eos": True}
    )
    try:
        client.chat.completions.create(**options)
        refused = {"type": "nothing was raised"}
    except openai.RateLimitError as error:
        refused = {
            "type": "RateLimitError",
            "code": error.code,
            "retryAfter": float(error.response.headers["retry-after"]),
        }
    waited = []
    sleep = time.sleep

    def end_what_runs(seconds):
        waited.append(seconds)
        running.close()
        sleep(seconds)

    time.sleep = end_what_runs
    try:
        answer = client.with_options(max_retries=4).chat.completions.create(**options)
    finally:
        time.sleep = sleep
    return {"refused": refused, "waited": waited, "finish": answer.choices[0].finish_reason}


main()
