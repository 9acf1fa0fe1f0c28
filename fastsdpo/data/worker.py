"""The program of a worker process that reads for `prepare`; `workers.py` starts it as a file.

It reads pickled objects from stdin: first ``sys.path``, then the options and the path of the file of rows, and then,
in any order,

- pieces to read. It writes their batches to stdout, and after a piece its report, or the error that ended it.
- places in the file. It writes the rows of one batch after another there; until then they wait in memory.
- light records (merging.py). It writes their keys to stdout.
"""

import sys

if not getattr(sys.flags, "safe_path", False):
    sys.path.pop(0)  # this folder, whose modules are no top-level ones

import os
import pickle
import signal
from collections import deque

MOST_WAITING = 16  # batches


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that reads the answers
    requests = sys.stdin.buffer
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a hook prints is no answer
    sys.path[:] = pickle.load(requests)
    from fastsdpo.data.reading import BatchReader, Piece, ReadReport, seldom_collected
    from fastsdpo.data.spool import keys_of_rows

    options, path = pickle.load(requests)
    reader, pieces, waiting = BatchReader(options), deque(), deque()

    def answer(value: object) -> None:
        pickle.dump(value, answers)
        answers.flush()

    with open(path, "r+b") as file, seldom_collected():

        def hear() -> None:
            try:
                request = pickle.load(requests)
            except EOFError:
                sys.exit()
            if isinstance(request, Piece):
                pieces.append(request)
            elif isinstance(request, int):
                file.seek(request)
                file.writelines(waiting.popleft())
                file.flush()
            else:
                answer(next(keys_of_rows(path, [request])))

        def read(piece: Piece) -> None:
            report = ReadReport()
            for batch in reader.read_piece(piece, report):
                while len(waiting) >= MOST_WAITING:
                    hear()
                waiting.append(batch.take_rows())
                answer((batch, report.records, report.bytes_done))
            answer(report)

        try:
            while True:
                while not pieces:
                    hear()
                read(pieces.popleft())
        except Exception as error:
            answer(error)


if __name__ == "__main__":
    main()
