"""Regular expressions from a filter, searched for in a process of their own.

A pattern such as `(a+)+$` takes longer than anyone waits, and `re` holds the interpreter's lock all the while: every
other request, heartbeats among them, would wait with it. The process may use one second of CPU, then the system ends
it.
"""

import json
import subprocess
import sys

from .walker import Refused

SECONDS = 1  # of CPU, the interpreter's start (0.02 s) among it
FLAGS = {"i": "IGNORECASE", "m": "MULTILINE", "s": "DOTALL", "x": "VERBOSE"}  # of $options
_PROGRAM = """
import json, re, resource, sys
pattern, flags, seconds, texts = json.load(sys.stdin)
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
try:
    pattern = re.compile(pattern, sum(re.RegexFlag[name] for name in flags))
    answer = [text for text in texts if pattern.search(text)]
except (re.error, RecursionError, OverflowError) as error:
    answer = str(error)
json.dump(answer, sys.stdout)
"""


def holding(texts: list[str], pattern: str, options: str = "") -> set[str]:
    """The texts that hold the pattern. `options`: letters of `FLAGS`, as MongoDB's $options.

    Raises `Refused` for what is no pattern, and for one that takes too long.
    """
    what = f"filters: cannot use $regex {str(pattern)[:80]!r} with $options {options!r}"
    if not (isinstance(pattern, str) and isinstance(options, str) and set(options) <= FLAGS.keys()):
        raise Refused(f"{what}: expected texts, of the options any of {', '.join(FLAGS)}")
    asked = json.dumps([pattern, [FLAGS[letter] for letter in set(options)], SECONDS, texts])
    done = subprocess.run([sys.executable, "-I", "-S", "-c", _PROGRAM], input=asked, capture_output=True, text=True)
    if done.returncode:
        raise Refused(f"{what}: it takes too long; leave out a repeat inside a repeat, as in (a+)+")
    answer = json.loads(done.stdout)
    if isinstance(answer, str):
        raise Refused(f"{what} ({answer})")
    return set(answer)
