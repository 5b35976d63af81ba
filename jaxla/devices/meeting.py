"""How processes meet: each of the others finds process 0, and all learn who is there, or why they cannot go on."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import socket
import struct
import time
from multiprocessing.connection import Connection
from typing import Any

from jaxla.config import InputError
from jaxla.devices.launch import Launch

log = logging.getLogger("jaxla")

GRACE = 3  # seconds for a process to end by itself, as all do that meet the same mistake
SILENCE = 30  # seconds without an answer of the other host, after which it counts as gone
KEEPALIVE = {  # by the names of Linux; elsewhere the system's own, longer times hold
    "TCP_KEEPIDLE": SILENCE // 3,
    "TCP_KEEPINTVL": SILENCE // 6,
    "TCP_KEEPCNT": 4,
    "TCP_USER_TIMEOUT": 1000 * SILENCE,  # ms, where something was sent
}


def meet(launch: Launch, timeout: float) -> tuple[dict[int, Connection], list[dict[str, Any]]]:
    """This process's links, and what each process, by its index, says of itself.

    Raises:
        InputError: not all come, or they do not fit together.
    """
    deadline = time.monotonic() + timeout
    hello = {
        "process": launch.index,
        "processes": launch.count,
        "host": platform.node(),
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
    }
    if launch.index:
        link, answer = _find_first(launch.coordinator, hello, deadline)
        links = {0: link}
    else:
        links, answer = _await_others(launch.coordinator, hello, deadline)
    if answer["problem"]:
        raise InputError(answer["problem"].format(waited=f"waited {timeout:g} s"))
    return links, answer["all"]


def _await_others(address: str, hello: dict[str, Any], deadline: float) -> tuple[dict[int, Connection], dict[str, Any]]:
    """Process 0's side of the meeting: a link to each of the others, and the answer that each of them was given."""
    host, port = host_and_port(address)
    try:
        listening = socket.create_server((host if _is_loopback(host) else "", port), backlog=hello["processes"])
    except OSError as error:
        reason = os.strerror(error.errno)
        raise InputError(
            f"option --coordinator={address}: port {port} of this host cannot be used ({reason}); is another process 0 "
            "there? Each needs a --process of its own; else name another port"
        ) from error
    links: dict[int, Connection] = {}
    came, problem, said = {0: hello}, "", False
    with listening:
        while len(came) < hello["processes"] and not problem:
            left = max(0.01, deadline - time.monotonic())
            listening.settimeout(left if said else min(GRACE, left))
            try:
                link = _linked(listening.accept()[0])
            except TimeoutError:
                missing = ", ".join(str(k) for k in range(hello["processes"]) if k not in came)
                if time.monotonic() < deadline:
                    log.info("waiting at %s for process %s of %d", address, missing, hello["processes"])
                    said = True
                    continue
                problem = (
                    f"{{waited}} at {address}, and process {missing} of {hello['processes']} did not come; start all "
                    "of them, or raise --wait"
                )
                break
            try:
                other = _receive(link, 5)
                k = int(other["process"])
                if other["processes"] != hello["processes"]:
                    problem = (
                        f"process {k} ({other['host']}) is one of {other['processes']}, process 0 ({hello['host']}) "
                        f"one of {hello['processes']}; give all the same --processes"
                    )
                elif k in came:
                    problem = f"two are process {k} ({came[k]['host']}, {other['host']}); give each its own --process"
            except (OSError, EOFError, ValueError, KeyError, TypeError):  # some other program
                continue
            links[k if k not in links else -1], came[k] = link, other
    answer = {"problem": problem, "all": [came[k] for k in sorted(came)]}
    for link in links.values():
        with contextlib.suppress(OSError):
            link.send_bytes(json.dumps(answer).encode())
    return links, answer


def _find_first(address: str, hello: dict[str, Any], deadline: float) -> tuple[Connection, dict[str, Any]]:
    """The others' side: the link to process 0, and its answer."""
    link, reason, began, said = None, "", time.monotonic(), False
    while time.monotonic() < deadline:
        if reason and not said and time.monotonic() > began + GRACE:
            log.info("process %d: looking for process 0 at %s (%s)", hello["process"], address, reason)
            said = True
        try:
            link = _linked(socket.create_connection(host_and_port(address), timeout=5))
            link.send_bytes(json.dumps(hello).encode())
            return link, _receive(link, deadline + 5 - time.monotonic())  # process 0's own limit may be a little later
        except (OSError, EOFError, ValueError) as error:  # not there yet, or some other program is
            reason = getattr(error, "strerror", None) or str(error) or "it closed the connection"
            time.sleep(0.2)
    problem = (
        f"option --coordinator={address}: {{waited}} for process 0, which could not be reached ({reason}); start it, "
        "open that port to this host, or name another"
    )
    return link, {"problem": problem}


def _linked(connected: socket.socket) -> Connection:
    connected.settimeout(None)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", SILENCE, 0))  # within a message
    for option, value in KEEPALIVE.items():
        if hasattr(socket, option):
            connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return Connection(connected.detach())


def _receive(link: Connection, seconds: float) -> dict[str, Any]:
    if not link.poll(seconds):
        raise OSError("it does not answer")
    return dict(json.loads(link.recv_bytes(1 << 20)))


def host_and_port(address: str) -> tuple[str, int]:
    host, port = address.rsplit(":", 1)
    return host.strip("[]"), int(port)


def _is_loopback(host: str) -> bool:
    return host in ("127.0.0.1", "localhost", "::1")


def bound_to(address: str) -> str | None:
    return address if _is_loopback(host_and_port(address)[0]) else None  # else all of the host's addresses
