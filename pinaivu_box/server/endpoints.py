"""The table of endpoints.  Routes, `/openapi.json` and the check of scopes are made from it.

To add an endpoint, write a handler and add its line here.  The types of its request and response
are those that the handler declares (see `endpoint`); the statuses of errors are the same for all
(see `openapi`).  Of two endpoints with the same path, the first that has the method serves.
"""

from __future__ import annotations

from pinaivu_box.server import (
    admin_accounts,
    admin_audit,
    admin_keys,
    admin_ledger,
    admin_models,
    admin_peers,
    admin_reload,
    chat,
    completions,
    embeddings,
    health,
    messages,
    models,
    ollama,
    pages,
    receipts,
    responses,
    tokens,
    usage,
)
from pinaivu_box.server.endpoint import Access, Endpoint

# fmt: off
ENDPOINTS: tuple[Endpoint, ...] = (
    Endpoint("POST", "/v1/chat/completions", "inference",
             chat.create_chat_completion, "Create a chat completion"),
    Endpoint("POST", "/v1/chat/completions/input_tokens", "inference",
             tokens.count_chat_tokens, "Count the prompt tokens of a chat"),
    Endpoint("POST", "/v1/completions", "inference",
             completions.create_completion, "Complete a text"),
    Endpoint("POST", "/v1/embeddings", "inference",
             embeddings.create_embeddings, "Create embeddings"),
    Endpoint("POST", "/v1/responses", "inference",
             responses.create_response, "Create a response, stored for further turns"),
    Endpoint("GET", "/v1/responses/{response_id}", "inference",
             responses.get_response, "Get a response, stored or running in the background"),
    Endpoint("DELETE", "/v1/responses/{response_id}", "inference",
             responses.delete_response, "Delete a response"),
    Endpoint("POST", "/v1/responses/{response_id}/cancel", "inference",
             responses.cancel_response, "Cancel a response that runs in the background"),
    Endpoint("GET", "/v1/responses/{response_id}/input_items", "inference",
             responses.list_input_items, "List the input items of a response"),
    Endpoint("POST", "/v1/messages", "inference",
             messages.create_message, "Create a message (Anthropic)"),
    Endpoint("POST", "/v1/messages/count_tokens", "inference",
             messages.count_message_tokens, "Count the prompt tokens of a message (Anthropic)"),
    Endpoint("POST", "/v1/tokenize", "inference", tokens.tokenize, "Convert text to tokens"),
    Endpoint("POST", "/v1/detokenize", "inference", tokens.detokenize, "Convert tokens to text"),
    Endpoint("POST", "/api/chat", "inference", ollama.chat, "Chat (Ollama)"),
    Endpoint("POST", "/api/generate", "inference", ollama.generate, "Complete a prompt (Ollama)"),
    Endpoint("POST", "/api/embed", "inference", ollama.embed, "Create embeddings (Ollama)"),
    Endpoint("POST", "/api/embeddings", "inference",
             ollama.embeddings, "Create an embedding (Ollama, old)"),
    Endpoint("GET", "/api/tags", "any key", ollama.tags, "List the models (Ollama)"),
    Endpoint("POST", "/api/show", "any key", ollama.show, "Describe a model (Ollama)"),
    Endpoint("GET", "/api/ps", "any key", ollama.ps, "List the loaded models (Ollama)"),
    Endpoint("GET", "/api/version", "public", ollama.version, "Get the version (Ollama)"),
    Endpoint("GET", "/v1/models", "any key", models.list_models, "List the models"),
    Endpoint("GET", "/v1/models/{model:path}", "any key", models.get_model, "Get a model"),
    Endpoint("GET", "/v1/engines", "admin", models.list_engines, "List the running engines"),
    Endpoint("GET", "/v1/receipts", "receipts",
             receipts.list_receipts, "List the receipts of an account (of all, for an admin key)"),
    Endpoint("GET", "/v1/receipts/{request_id}", "receipts",
             receipts.get_receipt, "Get the receipt of a request"),
    Endpoint("POST", "/v1/admin/reload", "admin", admin_reload.reload, "Reload the configuration"),
    Endpoint("GET", "/v1/usage", "usage", usage.get_usage, "Report usage"),
    Endpoint("GET", "/v1/admin/accounts", "admin",
             admin_accounts.list_accounts, "List the accounts by name"),
    Endpoint("POST", "/v1/admin/accounts", "admin",
             admin_accounts.create_account, "Create an account"),
    Endpoint("GET", "/v1/admin/accounts/{account}", "admin",
             admin_accounts.get_account, "Get an account by name or id"),
    Endpoint("PATCH", "/v1/admin/accounts/{account}", "admin",
             admin_accounts.change_account, "Change an account"),
    Endpoint("DELETE", "/v1/admin/accounts/{account}", "admin",
             admin_accounts.remove_account, "Remove an account and revoke its keys"),
    Endpoint("GET", "/v1/admin/keys", "admin", admin_keys.list_keys, "List the keys, newest first"),
    Endpoint("POST", "/v1/admin/keys", "admin", admin_keys.create_key, "Create a key"),
    Endpoint("GET", "/v1/admin/keys/{key_id}", "admin", admin_keys.get_key, "Get a key"),
    Endpoint("PATCH", "/v1/admin/keys/{key_id}", "admin", admin_keys.change_key, "Change a key"),
    Endpoint("POST", "/v1/admin/keys/{key_id}/rotate", "admin",
             admin_keys.rotate_key, "Replace the secret of a key"),
    Endpoint("POST", "/v1/admin/keys/{key_id}/revoke", "admin",
             admin_keys.revoke_key, "Revoke a key permanently"),
    Endpoint("GET", "/v1/admin/peers", "admin", admin_peers.list_peers, "List the peers"),
    Endpoint("POST", "/v1/admin/peers", "admin", admin_peers.join, "Join a network by a ticket"),
    Endpoint("POST", "/v1/admin/peers/invitations", "admin",
             admin_peers.invite, "Create a ticket for another box"),
    Endpoint("POST", "/v1/admin/peers/leave", "admin", admin_peers.leave, "Leave the network"),
    Endpoint("GET", "/v1/admin/peers/{peer}", "admin",
             admin_peers.get_peer, "Get a peer by name or id"),
    Endpoint("PATCH", "/v1/admin/peers/{peer}", "admin",
             admin_peers.change_peer, "Change the name and limits of a peer"),
    Endpoint("DELETE", "/v1/admin/peers/{peer}", "admin",
             admin_peers.remove_peer, "Revoke a peer permanently"),
    Endpoint("GET", "/v1/admin/models", "admin",
             admin_models.list_model_files, "List model files, served or not"),
    Endpoint("POST", "/v1/admin/models/pull", "admin",
             admin_models.pull, "Copy a model from other boxes"),
    Endpoint("GET", "/v1/admin/audit", "admin",
             admin_audit.list_audit_entries, "List the audit trail, newest first"),
    Endpoint("GET", "/v1/admin/ledger", "admin",
             admin_ledger.list_balances, "List the balances with peers"),
    Endpoint("GET", "/v1/admin/ledger/statements", "admin",
             admin_ledger.list_statements, "List the statements, newest first"),
    Endpoint("POST", "/v1/admin/ledger/statements/{statement}/paid", "admin",
             admin_ledger.mark_paid, "Mark a statement as paid"),
    Endpoint("GET", "/v1/admin/ledger/{peer}/entries", "admin",
             admin_ledger.list_entries, "List the entries with a peer, newest first"),
    Endpoint("POST", "/v1/admin/ledger/{peer}/settle", "admin",
             admin_ledger.settle, "Settle with a peer"),
    Endpoint("POST", "/v1/admin/ledger/{peer}/forgive", "admin",
             admin_ledger.forgive, "Write off the entries that a peer has not accepted"),
    Endpoint("GET", "/", "public", pages.index),
    Endpoint("GET", "/openapi.json", "public", pages.openapi_document),
    Endpoint("GET", "/docs", "public", pages.docs),
    Endpoint("GET", "/health", "public", health.health),
    Endpoint("GET", "/readyz", "public", health.readyz),
    Endpoint("GET", "/metrics", "public", health.metrics),
)
# fmt: on
# The access of a resource by the first two segments of its paths, as /v1/admin.
_RESOURCES = [
    ("/".join(endpoint.path.split("/")[:3]), endpoint.access)
    for endpoint in ENDPOINTS
    if endpoint.access != "public"
]


def access_to(method: str, path: str) -> Access:
    """Who may send that request.

    Where no endpoint serves it, that is who may use the other endpoints of its resource: all others
    get a 403, and do not learn what exists.
    """
    for endpoint in ENDPOINTS:
        if endpoint.serves(method, path):
            return endpoint.access
    if not path.startswith("/v1"):
        return "public"
    return next((access for prefix, access in _RESOURCES if path.startswith(prefix)), "inference")
