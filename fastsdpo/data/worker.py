"""The program of a process that reads for `prepare`; `workers.py` starts it as a file.

On stdin come pickled: ``sys.path``; the options and the file of rows; the pieces to read, one by one. On stdout go
batches as they are read, and after the last of a piece its report, or the error that ended it.
"""

import sys

if not getattr(sys.flags, "safe_path", False):
    sys.path.pop(0)  # this folder, whose modules are no top-level ones

import os
import pickle
import signal


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that reads the answers
    requests = sys.stdin.buffer
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a hook prints is no answer
    sys.path[:] = pickle.load(requests)
    from fastsdpo.data.reading import BatchReader, ReadReport

    options, path = pickle.load(requests)
    with open(path, "ab") as rows:
        reader = BatchReader(options, rows)
        while True:
            try:
                piece = pickle.load(requests)
            except EOFError:
                return
            report = ReadReport()
            answer: object = report
            try:
                for batch in reader.read_piece(piece, report):
                    batch.keys.pack()
                    pickle.dump((batch, report.records, report.bytes_done), answers)
                    answers.flush()
            except Exception as error:
                answer = error
            pickle.dump(answer, answers)
            answers.flush()


if __name__ == "__main__":
    main()
