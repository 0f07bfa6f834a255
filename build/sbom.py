"""The bill of materials of a release in CycloneDX 1.6.  Run by the Python of .venv/release.

sbom.py COMPONENTS TARGET VERSION TIME [FILE...]

COMPONENTS is what `pinaivu licenses --json` prints, TIME the release's in seconds since 1970, and
FILEs are the executables that consist of it, whose digests are in the document.
"""

import hashlib
import json
import sys
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

TYPES = {
    "program": "application",
    "package": "library",
    "library": "library",
    "model": "machine-learning-model",
}


def document(parts: list[dict[str, Any]], version: str, time: int, files: list[Path]) -> Any:
    parts = sorted(parts, key=lambda one: (one["name"] != "pinaivu-box", one["kind"], one["name"]))
    main, *others = parts
    content = json.dumps([parts, version, [digest(path) for path in files]], sort_keys=True)
    moment = datetime.fromtimestamp(time, UTC).isoformat().replace("+00:00", "Z")
    components = [component(one) for one in others]
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        # The same contents have the same number.
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, content)}",
        "version": 1,
        "metadata": {
            "timestamp": moment,
            "component": {
                **component(main),
                "version": version,
                "components": [
                    {
                        "type": "file",
                        "name": path.name,
                        "hashes": [{"alg": "SHA-256", "content": digest(path)}],
                    }
                    for path in files
                ],
            },
        },
        "components": components,
        "dependencies": [
            {
                "ref": reference(main),
                "dependsOn": sorted(one["bom-ref"] for one in components),
            }
        ],
    }


def component(part: dict[str, Any]) -> dict[str, Any]:
    made = {
        "type": TYPES[part["kind"]],
        "bom-ref": reference(part),
        "name": part["name"],
        "version": part["version"],
        "licenses": [license_of(part["license"])],
    }
    if part["kind"] == "package":
        made["purl"] = f"pkg:pypi/{part['name'].lower().replace('_', '-')}@{part['version']}"
    if part["source"]:
        made["description"] = part["source"]
    if part["parts"]:
        made["components"] = [linked(one, reference(part)) for one in part["parts"]]
    return made


def linked(part: dict[str, Any], inside: str) -> dict[str, Any]:
    """A library that was linked into a component."""
    made = {"type": "library", "name": part["name"], "version": part["version"]}
    made["bom-ref"] = f"{inside}/{part['name']}@{part['version']}"
    if part["license"]:
        made["licenses"] = [license_of(part["license"])]
    return made


def license_of(expression: str) -> dict[str, Any]:
    return {"expression": expression}


def reference(part: dict[str, Any]) -> str:
    return f"{part['kind']}:{part['name']}"


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def validate(text: str) -> None:
    """Exits with a sentence if the document is not valid by CycloneDX's own schema."""
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    error = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    if error is not None:
        sys.exit(f"the bill of materials is not valid: {str(error.data)[:300]}")


def main(source: str, target: str, version: str, time: str, *files: str) -> None:
    parts = json.loads(Path(source).read_text())
    made = document(parts, version, int(time), [Path(file) for file in files])
    text = json.dumps(made, indent=2, ensure_ascii=False) + "\n"
    validate(text)
    Path(target).write_text(text)


if __name__ == "__main__":
    main(*sys.argv[1:])
