"""Processes that were forked after JAX had started its threads, which a fork does not copy: JAX waits for them forever.

Such a process computes nothing itself. What it only has to score, a fresh process scores for it.
"""

import os
import pickle
import subprocess
import sys
import threading
import warnings
import weakref
from typing import Any

import numpy as np
from jax._src import xla_bridge

from jaxad.data import Preprocess, open_data

ADVICE = 'start workers with multiprocessing.get_context("spawn")'
_forked = False


def _after_fork() -> None:
    global _forked
    _forked = _forked or xla_bridge.backends_are_initialized()


os.register_at_fork(after_in_child=_after_fork)


def forked() -> bool:
    """Whether this process was forked from one in which JAX was used."""
    return _forked


def check() -> None:
    """Raises RuntimeError where JAX would hang."""
    if _forked:
        raise RuntimeError(f"this process was forked from one that had used JAX, which hangs in it: {ADVICE}")


class Substitute:
    """A fresh process that scores for a forked one; it ends with this object or with this process.

    Args:
        detector: Can be pickled and has a method `score`.

    Attributes:
        owner: The id of the forked process.
    """

    def __init__(self, detector: Any) -> None:
        warnings.warn(
            f"this process was forked from one that had used JAX: another one is started to score for it; {ADVICE}",
            stacklevel=2,
        )
        program = f"import sys; sys.path[:] = {sys.path!r}; from jaxad.driver import fork; fork.serve()"
        pipe = subprocess.PIPE
        self._process = subprocess.Popen([sys.executable, "-c", program], stdin=pipe, stdout=pipe)
        self._lock, self.owner = threading.Lock(), os.getpid()
        weakref.finalize(self, _end, self._process)
        self._ask(detector)

    def score(self, images: np.ndarray) -> Any:
        """The `Scores` of preprocessed images (n h w 3, uint8)."""
        return self._ask(images)

    def _ask(self, question: Any) -> Any:
        process = self._process
        assert process.stdin and process.stdout
        with self._lock:
            try:
                pickle.dump(question, process.stdin)
                process.stdin.flush()
                answer = pickle.load(process.stdout)
            except (EOFError, BrokenPipeError) as error:
                raise RuntimeError(f"the process that scores for a forked one ended: {ADVICE}") from error
        if isinstance(answer, Exception):
            raise answer
        return answer


def _end(process: subprocess.Popen) -> None:
    assert process.stdin and process.stdout
    process.stdin.close()
    process.stdout.close()
    process.wait()


def serve() -> None:
    """What a `Substitute` runs: reads a detector, then images, and answers with their scores."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what is printed must not come between the answers
    detector = None
    while True:
        try:
            question, answer = pickle.load(sys.stdin.buffer), None
            if detector is None:
                detector = question
            else:
                data = open_data(question, preprocess=Preprocess(None))["arrays"].train
                (answer,) = (scores for _, scores in detector.score(data))
        except EOFError:
            return
        except Exception as error:
            answer = error
        pickle.dump(answer, answers)
        answers.flush()
