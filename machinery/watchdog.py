"""python machinery/watchdog.py RUN COMMAND...: the user's server, ended with the run whatever ends the run.

It stands between the run (a process id) and the server, and ends the server and every process that the server has
started when the run is gone, SIGKILL included. Run by its path, so it needs the standard library alone.
"""
import contextlib
import os
import signal
import subprocess
import sys
import time

ENDED = "serve.py: the server has ended, status"


def watch(run, words):
    """The leader of the server's session, so that one signal reaches all of the server's processes.

    Linux hands an orphan to another parent at once, whatever its parent died of; that is how the run's end is seen."""
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    server = subprocess.Popen(words)
    while server.poll() is None and os.getppid() == run and not asked:
        time.sleep(0.2)
    if server.poll() is None:
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(10)
    else:
        print(f"{ENDED} {server.returncode}", flush=True)
    os.killpg(os.getpgid(0), signal.SIGKILL)  # the server's engine and workers, and this process


if __name__ == "__main__":
    watch(int(sys.argv[1]), sys.argv[2:])
