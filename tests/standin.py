"""A stand-in for W&B's server: what `wandb sweep`, its agents and online runs ask of one.

Written from what the clients were seen to send (wandb 0.31). It keeps configurations and streamed
lines, so that a test can read a run's metric on the server's side.
"""

import gzip
import itertools
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

ENTITY = {"id": "E", "name": "someone"}


class StandIn:
    """Use it as a context manager; `environment` leads the clients here."""

    def __init__(self):
        self.runs: dict[str, dict[str, Any]] = {}
        """By id: the configuration that was sent, and the lines of each streamed file."""
        self.asked: list[str] = []
        self._config = ""
        self._waiting: list[dict[str, Any]] = []
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                body = gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body
                with outer._lock:
                    if self.path.endswith("graphql"):
                        self.answer({"data": outer.graphql(json.loads(body or b"{}"))})
                    else:
                        outer.stream(self.path, json.loads(body or b"{}"))
                        self.answer({})

            def do_PUT(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self.answer({})

            def do_GET(self) -> None:
                self.answer({})

            def answer(self, value: object) -> None:
                body = json.dumps(value).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> "StandIn":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def environment(self) -> dict[str, str]:
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": "local" + "0" * 35,
                "WANDB_ENTITY": "someone", "WANDB_PROJECT": "vitx"}  # fmt: skip

    def history(self, run: str, metric: str) -> list[float]:
        """The values of a metric that a run has streamed."""
        lines = self.runs[run]["lines"].get("wandb-history.jsonl", [])
        events = [json.loads(line) for line in lines]
        return [event[metric] for event in events if metric in event]

    def stream(self, path: str, body: dict[str, Any]) -> None:
        """What a run sends while it lives: POST /files/ENTITY/PROJECT/RUN/file_stream."""
        if not path.endswith("file_stream"):
            return
        kept = self.runs.setdefault(path.split("/")[-2], {"config": {}, "lines": {}})
        for name, part in (body.get("files") or {}).items():
            kept["lines"].setdefault(name, []).extend(part.get("content", []))

    def graphql(self, body: dict[str, Any]) -> dict[str, Any]:
        """The answer to one query, by a word that only it holds."""
        query, values = body.get("query", ""), body.get("variables") or {}
        for word, answer in (
            ("upsertSweep", self._sweep),
            ("sweep(sweepName", self._known_sweep),
            ("createAgent", lambda _: {"createAgent": {"agent": {"id": "A"}}}),
            ("agentHeartbeat", self._heartbeat),
            ("upsertBucket", self._run),
            ("createRunFiles", self._files),
            ("viewer", self._viewer),
            ("serverInfo", lambda _: {"serverInfo": {"features": []}}),
            ("organization", lambda _: {"entity": {"organization": None}}),
        ):
            if word in query:
                self.asked.append(word)
                return answer(values)
        return {}

    def _sweep(self, values: dict[str, Any]) -> dict[str, Any]:
        self._config = values["config"]
        parameters = yaml.safe_load(self._config)["parameters"]
        choices = [each.get("values", [each.get("value")]) for each in parameters.values()]
        points = itertools.product(*choices)
        self._waiting = [dict(zip(parameters, point, strict=True)) for point in points]
        project = {"id": "P", "name": "vitx", "entity": ENTITY}
        return {"upsertSweep": {"sweep": {"name": "sweep001", "project": project},
                                "configValidationWarnings": []}}  # fmt: skip

    def _known_sweep(self, _: dict[str, Any]) -> dict[str, Any]:
        empty = ("description", "createdAt", "heartbeatAt", "updatedAt", "bestLoss", "controller",
                 "scheduler")  # fmt: skip
        sweep = dict.fromkeys(empty) | {
            "id": "S", "name": "sweep001", "method": "grid", "state": "RUNNING",
            "config": self._config, "earlyStopJobRunning": False, "runs": {"edges": []},
        }  # fmt: skip
        return {"project": {"sweep": sweep}}

    def _heartbeat(self, values: dict[str, Any]) -> dict[str, Any]:
        """One run at a time, as long as there are points."""
        commands: list[dict[str, Any]] = []
        if not any(json.loads(values.get("runState") or "{}").values()):
            if self._waiting:
                point = self._waiting.pop(0)
                commands = [{
                    "type": "run", "run_id": f"agent{len(self._waiting):03d}", "run_name": "r",
                    "program": yaml.safe_load(self._config).get("program"),
                    "args": {name: {"value": value} for name, value in point.items()},
                }]  # fmt: skip
            else:
                commands = [{"type": "exit"}]
        return {"agentHeartbeat": {"agent": {"id": "A"}, "commands": json.dumps(commands)}}

    def _run(self, values: dict[str, Any]) -> dict[str, Any]:
        name = values.get("name") or "unnamed"
        kept = self.runs.setdefault(name, {"config": {}, "lines": {}})
        if values.get("config"):
            kept["config"] = json.loads(values["config"])
        for word in ("sweep", "groupName", "displayName"):
            kept[word] = values.get(word) or kept.get(word)
        project = {"id": "P", "name": "vitx", "entity": ENTITY}
        bucket = {
            "id": f"B{name}", "name": name, "displayName": values.get("displayName") or name,
            "description": None, "config": values.get("config"), "sweepName": values.get("sweep"),
            "historyLineCount": 0, "project": project,
        }  # fmt: skip
        return {"upsertBucket": {"bucket": bucket, "inserted": True}}

    def _files(self, values: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": name, "uploadUrl": f"{self.url}/up/{name}"} for name in values["files"]]
        return {"createRunFiles": {"runID": "R", "uploadHeaders": [], "files": files}}

    def _viewer(self, _: dict[str, Any]) -> dict[str, Any]:
        viewer = {
            "id": "U", "username": "someone", "entity": "someone", "flags": "{}", "admin": False,
            "email": "a@b.c", "name": "someone", "teams": {"edges": []}, "apiKeys": {"edges": []},
        }  # fmt: skip
        server = {"cliVersionInfo": {}, "latestLocalVersionInfo": None, "features": []}
        return {"viewer": viewer, "serverInfo": server}
