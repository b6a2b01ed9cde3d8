# SPDX-License-Identifier: MIT
"""The far end of remote.Remote: serves one contestant over standard input and output.

Usage: python -m harness.worker MODULE:CLASS
A request is a pickled (method, arguments); the answer is a pickled ("ok", result), or
("unavailable", reason) or ("error", text).
"""

from __future__ import annotations

import importlib
import os
import pickle
import signal
import sys

from harness.case import Case, Data
from harness.contestant import Unavailable


def main() -> None:
    # Ctrl-C is the parent's to handle; this process ends when its standard input does.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    requests = sys.stdin.buffer
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a stray print must not end up among the answers
    module, name = sys.argv[1].split(":")
    contestant = getattr(importlib.import_module(module), name)("remote", "remote")
    while True:
        try:
            method, arguments = pickle.load(requests)
        except EOFError:
            return
        try:
            if method == "prepare":
                arguments = (Data(Case(*arguments)),)
            answer = ("ok", getattr(contestant, method)(*arguments))
        except Unavailable as reason:
            answer = ("unavailable", str(reason))
        except Exception as error:
            answer = ("error", f"{type(error).__name__}: {error}")
        arguments = None
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    main()
