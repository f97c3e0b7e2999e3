"""CloudEvents 1.0 in NATS binary mode: the headers that travel beside every message."""

from __future__ import annotations

from datetime import datetime
from typing import Final

CLOUDEVENTS: Final = "1.0"
JSON: Final = "application/json"


def headers(
    *, event_id: str, source: str, event_type: str, subject: str, at: datetime, traceparent: str = "",
    content_type: str = JSON,
) -> dict[str, str]:  # fmt: skip
    """The headers of one event. `Nats-Msg-Id` equals the event id, so that the broker drops repeats."""
    found = {
        "ce-specversion": CLOUDEVENTS,
        "ce-id": event_id,
        "ce-source": f"/loopback/{source}",
        "ce-type": f"loopback.{event_type}",
        "ce-time": at.isoformat().replace("+00:00", "Z"),
        "ce-subject": subject,
        "ce-datacontenttype": content_type,
        "Nats-Msg-Id": event_id,
    }
    if traceparent:
        found["traceparent"] = traceparent
    return found
