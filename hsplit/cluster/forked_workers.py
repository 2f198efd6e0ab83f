"""Starts Ray's worker processes as forks of one process that has done the imports.

Importing torch, transformers and bitsandbytes takes five seconds of a core, and every actor is a process. On a local
cluster :class:`~hsplit.cluster.fork_server.ForkServer` imports them once. Ray starts its workers with this file, which
has the server fork a process for Ray's own worker program, and stays until that one ends. Where there is no server, it
runs the program itself, as Ray would have.
"""

# This file runs for every worker, before anything else: it imports only what it needs.
import json
import os
import socket
import sys


def main(path: str, command: list[str]) -> None:
    """Have ``command``, a Python program with its arguments, run by the fork server at ``path``.

    Returns when it has ended. It ends when this process is killed.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        try:
            connection.connect(path)
        except OSError:
            os.execv(sys.executable, [sys.executable, *command])
        request = json.dumps({"command": command, "environment": dict(os.environ), "directory": os.getcwd()})
        socket.send_fds(connection, [len(request.encode()).to_bytes(4, "big")], [0, 1, 2])
        connection.sendall(request.encode())
        # Nothing is ever sent back: the end of the connection is the end of the worker.
        connection.recv(1)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
