"""Runs the flows of one client and prints what each saw, one JSON line a flow: the test judges, not the script."""

import json
import sys
import traceback

flows = []


def flow(function):
    flows.append(function)
    return function


def failure_of(call):
    """What a call that must fail raised, as the client's users catch it."""
    try:
        call()
    except Exception as error:
        return {
            "type": type(error).__name__,
            "message": str(error),
            "param": getattr(error, "param", None),
            "code": getattr(error, "code", None),
        }
    return {"type": "nothing was raised"}


def run(given):
    """given: url, key, limitedKey, item {messages, prompt, answer}"""
    for function in flows:
        try:
            seen = function(given)
        except Exception:
            seen = {"failed": traceback.format_exc()}
        print(json.dumps({"flow": function.__name__, **seen}), flush=True)


def main():
    run(json.load(sys.stdin))
