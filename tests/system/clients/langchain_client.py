from typing import Literal

from flows import failure_of, flow, main
from langchain_core.callbacks import UsageMetadataCallbackHandler
from langchain_core.messages import AIMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel


class Booking(BaseModel):
    """A room that is booked."""

    city: Literal["Paris", "Rome"]
    breakfast: bool


@tool
def book_room(city: Literal["Paris", "Rome"], breakfast: bool) -> str:
    """Books a hotel room."""
    return f"Booked in {city}."


question = "Book a room in Rome, with breakfast."


def chat_of(given, model="base", **options):
    return ChatOpenAI(
        **{
            "model": model,
            "base_url": f"{given['url']}/v1",
            "api_key": given["key"],
            "temperature": 0,
            "max_tokens": 64,
            "max_retries": 0,
            **options,
        }
    )


@flow
def invoke(given):
    chat = chat_of(given, "dates", max_tokens=16, stream_usage=True)
    messages = given["item"]["messages"]
    usage = UsageMetadataCallbackHandler()
    answer = chat.invoke(messages, config={"callbacks": [usage]})
    pieces = list(chat.stream(messages))
    whole = pieces[0]
    for piece in pieces[1:]:
        whole += piece
    return {
        "text": answer.text,
        "usage": answer.usage_metadata["total_tokens"],
        "counted": [each["total_tokens"] for each in usage.usage_metadata.values()],
        "streamed": whole.text,
        "pieces": len(pieces),
        "streamUsage": whole.usage_metadata["total_tokens"],
        "batched": [each.text for each in chat.batch([messages, messages])],
    }


@flow
def tools(given):
    chat = chat_of(given)
    asked = chat.bind_tools([book_room], tool_choice="any", parallel_tool_calls=False).invoke(question)
    [call] = asked.tool_calls
    done = book_room.invoke(call)
    after = chat_of(given, max_tokens=4).invoke([("user", question), asked, done])
    return {
        "name": call["name"],
        "args": call["args"],
        "isMessage": isinstance(done, ToolMessage),
        "isAnswer": isinstance(after, AIMessage),
    }


@flow
def structured(given):
    chat = chat_of(given, temperature=1, seed=4)
    return {
        method: chat.with_structured_output(Booking, method=method).invoke(question).model_dump()
        for method in ["json_schema", "function_calling"]
    }


@flow
def embeddings(given):
    # Unless it is told not to, it sends token ids of OpenAI's tokenizer, which no other model knows.
    embedder = OpenAIEmbeddings(
        model="base", base_url=f"{given['url']}/v1", api_key=given["key"], check_embedding_ctx_length=False
    )
    query = embedder.embed_query("a quiet room")
    documents = embedder.embed_documents(["a quiet room", "a loud street"])
    return {"query": query, "documents": documents}


@flow
def errors(given):
    return {
        "key": failure_of(lambda: chat_of(given, api_key="wrong").invoke("hello")),
        "model": failure_of(lambda: chat_of(given, "nobody").invoke("hello")),
    }


main()
