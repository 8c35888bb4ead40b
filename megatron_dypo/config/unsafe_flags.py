"""Flags of SGLang that would show a secret, open a socket that asks for no key, or run code of a model folder.

Source: SGLang 0.5.23, ``srt/arg_groups/fields``.
"""

from __future__ import annotations

_SHOWN = "`ps` and config.yaml would show it"
_GRPC = "SGLang's gRPC asks for no key; the run speaks HTTP"
_EVENTS = "its socket asks for no key and sends to everybody what the server does"
_SPLIT = "its servers find each other by a port that asks for no key, and a run knows no divided servers"
_SEED = "it gives the weights away by a port that asks for no key; refits bring servers their weights"
_WORKERS = "with several, SGLang checks no key; use more servers (rollout.servers.per_node)"

UNSAFE_FLAGS = {
    "--admin-api-key": f"{_SHOWN}; a run needs none, and every route asks for the key in the variable that "
    "rollout.servers.api_key_env names",
    "--ssl-keyfile-password": f"{_SHOWN}, and a run reaches the servers that it starts by http://",
    "--grpc-mode": _GRPC,
    "--smg-grpc-mode": _GRPC,
    "--grpc-port": _GRPC,
    "--smg-grpc-port": _GRPC,
    "--smg-http-sidecar-port": _GRPC,
    "--grpc-http-sidecar-port": _GRPC,
    "--sidecar": _GRPC,
    "--sidecar-args": _GRPC,
    "--kv-events-config": _EVENTS,
    "--load-publish-endpoint": _EVENTS,
    "--gated-launch-port": "the port of its control asks for no key",
    "--use-ray": "Ray's ports ask for no key",
    "--enable-http2": "its server takes WebSockets, for which SGLang asks for no key",
    "--tokenizer-worker-num": _WORKERS,
    "--enable-http-worker-reuseport": _WORKERS,
    "--disaggregation-mode": _SPLIT,
    "--disaggregation-bootstrap-port": _SPLIT,
    "--encoder-only": _SPLIT,
    "--encoder-bootstrap-port": _SPLIT,
    "--decoupled-spec-bind-endpoint": _SPLIT,
    "--decoupled-spec-connect-endpoints": _SPLIT,
    "--remote-instance-weight-loader-start-seed-via-transfer-engine": _SEED,
    "--engine-info-bootstrap-port": _SEED,
    "--trust-remote-code": "it runs code of the model folder; a run takes models that need none of it",
}
"""Each flag with the reason why a run refuses it."""
