"""Call the C++ operators of the CPU with anything, under sanitizers of addresses, undefined behaviour and threads.

    make fuzz                                          ten minutes; first the corpus, then what hypothesis makes up
    make fuzz ARGS="--minutes 1 --seed 7"
    make fuzz ARGS="--only threads"                    the time is else shared by memory and threads
    make fuzz ARGS="--replay build/fuzz/found.json"    one call again

The extension is compiled anew with the sanitizers, in build/fuzz. What ends the process is kept as
build/fuzz/found.json; once mended it belongs into tests/fuzz/corpus. Needs Linux and GCC.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from fuzz.sanitized import ROOT, SANITIZERS

BUILD, CORPUS = ROOT / "build" / "fuzz", Path(__file__).parent / "corpus"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 if nothing was found, 1 if something was, 2 if nothing could be called."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--only", nargs="+", choices=SANITIZERS, default=list(SANITIZERS), help="sanitizers of these")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the first calls (the time)")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="make the call of that file, and no other")
    given = parser.parse_args(argv)
    # Not found.json itself, because that of an earlier run is kept until there is another.
    current, found, corpus, seconds = BUILD / "current.json", BUILD / "found.json", CORPUS, 60 * given.minutes
    if given.replay is not None:
        corpus, seconds, content = BUILD / "replay", 0.0, given.replay.read_bytes()
        shutil.rmtree(corpus, ignore_errors=True)
        corpus.mkdir(parents=True)
        found = corpus / "call.json"
        found.write_bytes(content)
    for name in given.only:
        sanitizers, share = SANITIZERS[name], seconds / len(given.only)
        package = sanitizers.build(BUILD / name)
        current.unlink(missing_ok=True)
        print(f"{name}: seed {given.seed}, {share:.0f} s", flush=True)
        command = [sys.executable, "-m", "fuzz.worker", *map(str, (current, corpus, share, given.seed))]
        status = subprocess.run(command, env=sanitizers.environment(package), cwd=BUILD).returncode
        if status and not current.exists():
            print(f"the worker did not start: its exit status is {status}, and it made no call")
            return 2
        if status:
            current.replace(found)
            print(f"found with seed {given.seed}, exit status {status}: {found}\n{found.read_text(encoding='utf-8')}")
            return 1
        current.unlink(missing_ok=True)
    print("nothing found")
    return 0


if __name__ == "__main__":
    sys.exit(main())
