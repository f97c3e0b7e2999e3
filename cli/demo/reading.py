"""Reading one host out of what `loopback host list --json` says."""

from __future__ import annotations

from typing import Any


def firewall_of(host: dict[str, Any]) -> dict[str, Any]:
    """The firewall's part of it; empty where it has none."""
    return next((module for module in host.get("modules", []) if module["module"] == "firewall"), {})


def running_of(module: dict[str, Any]) -> dict[str, Any]:
    """What was promoted; empty where nothing was."""
    return module.get("promoted") or {}


def drops(metrics: dict[str, float]) -> float:
    """Packets that the firewall dropped, by rule or by default, from a module's metrics."""
    return metrics.get("loopback_firewall_dropped_packets_total", 0.0)
