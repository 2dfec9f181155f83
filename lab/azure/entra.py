"""Entra's token endpoint for client secrets. Tokens are signed, carry their expiry, and outlive a restart of the laboratory."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import secrets
import time
import uuid

from farshore.lab.azure.model import ArmError, Json
from farshore.lab.azure.world import World

_ARM = "https://management.azure.com"
_STORAGE = "https://storage.azure.com"


class Entra:
    """One tenant with one application."""

    def __init__(self, world: World) -> None:
        self._world = world
        held = world.store.setting("entra")
        if held is None:
            held = {"secret": secrets.token_urlsafe(24), "key": secrets.token_hex(32), "not_before": 0.0}
            world.store.set_setting("entra", held)
        self._held: Json = held

    @property
    def client_secret(self) -> str:
        return str(self._held["secret"])

    def expire(self) -> None:
        """From now on every token issued so far is expired."""
        self._held["not_before"] = time.time()
        self._world.store.set_setting("entra", self._held)

    def openid(self, base: str, tenant: str) -> Json:
        self._check_tenant(tenant)
        root = f"{base}/{tenant}"
        return {
            "issuer": f"{root}/v2.0",
            "authorization_endpoint": f"{root}/oauth2/v2.0/authorize",
            "token_endpoint": f"{root}/oauth2/v2.0/token",
            "device_authorization_endpoint": f"{root}/oauth2/v2.0/devicecode",
            "jwks_uri": f"{root}/discovery/v2.0/keys",
            "token_endpoint_auth_methods_supported": ["client_secret_post", "client_secret_basic"],
            "response_types_supported": ["code"],
            "subject_types_supported": ["pairwise"],
            "tenant_region_scope": "EU",
        }

    def _check_tenant(self, tenant: str) -> None:
        if tenant.lower() != self._world.tenant:
            raise TokenRefused(400, "invalid_tenant", f"AADSTS90002: Tenant '{tenant}' not found.")

    def token(self, tenant: str, form: dict[str, str]) -> Json:
        """The answer to a token request. Raises: TokenRefused."""
        self._check_tenant(tenant)
        if form.get("grant_type") != "client_credentials":
            raise TokenRefused(
                400,
                "unsupported_grant_type",
                f"AADSTS70003: The grant type '{form.get('grant_type')}' isn't supported.",
            )
        if form.get("client_id") != self._world.client_id:
            raise TokenRefused(
                400,
                "unauthorized_client",
                f"AADSTS700016: Application '{form.get('client_id')}' was not found.",
            )
        if not hmac.compare_digest(form.get("client_secret", ""), self.client_secret):
            raise TokenRefused(401, "invalid_client", "AADSTS7000215: Invalid client secret provided.")
        scope = form.get("scope", "")
        if not scope.endswith("/.default"):
            raise TokenRefused(
                400, "invalid_scope", f"AADSTS1002012: The scope '{scope}' is not valid: /.default is needed."
            )
        seconds = self._world.knobs.token_seconds
        now = time.time()
        claims = {
            "aud": scope.removesuffix("/.default"),
            "iss": f"https://sts.windows.net/{tenant}/",
            "appid": self._world.client_id,
            "tid": tenant,
            "iat": now,
            "exp": now + seconds,
            "uti": uuid.uuid4().hex,
        }
        return {
            "token_type": "Bearer",
            "expires_in": seconds,
            "ext_expires_in": seconds,
            "access_token": self._sign(claims),
        }

    def _sign(self, claims: Json) -> str:
        head = _b64(json.dumps({"typ": "JWT", "alg": "HS256"}).encode())
        body = f"{head}.{_b64(json.dumps(claims).encode())}"
        return f"{body}.{self._mac(body)}"

    def _mac(self, text: str) -> str:
        return _b64(hmac.digest(bytes.fromhex(str(self._held["key"])), text.encode(), hashlib.sha256))

    def accepts_storage(self, token: str) -> bool:
        """Whether a bearer token opens the storage account."""
        try:
            self.check(f"Bearer {token.removeprefix('Bearer ')}", _STORAGE)
        except ArmError:
            return False
        return True

    def check(self, authorization: str | None, audience: str = _ARM) -> str:
        """The principal behind a bearer token. Raises: ArmError 401."""
        if not authorization or not authorization.lower().startswith("bearer "):
            raise _unauthorized(
                "AuthenticationFailed", "Authentication failed. The 'Authorization' header is missing."
            )
        token = authorization.split(" ", 1)[1].strip()
        body, _, mac = token.rpartition(".")
        if not body or not hmac.compare_digest(mac, self._mac(body)):
            raise _unauthorized("InvalidAuthenticationToken", "The access token is invalid.")
        claims = json.loads(_unb64(body.split(".")[1]))
        if claims["aud"].rstrip("/") != audience:
            raise _unauthorized(
                "InvalidAuthenticationTokenAudience",
                f"The access token has been obtained for wrong audience or resource '{claims['aud']}'.",
            )
        if time.time() >= claims["exp"] or claims["iat"] < float(self._held["not_before"]):
            raise _unauthorized(
                "ExpiredAuthenticationToken",
                f"The access token expiry UTC time '{claims['exp']:.0f}' is earlier than now.",
            )
        return str(claims["appid"])


class TokenRefused(Exception):
    """An OAuth error of the token endpoint."""

    def __init__(self, status: int, error: str, description: str) -> None:
        super().__init__(description)
        self.status = status
        code = description.removeprefix("AADSTS").split(":", 1)[0]
        self.body: Json = {
            "error": error,
            "error_description": description,
            "error_codes": [int(code)],
            "timestamp": time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime()),
            "trace_id": str(uuid.uuid4()),
            "correlation_id": str(uuid.uuid4()),
        }


def _unauthorized(code: str, message: str) -> ArmError:
    challenge = f'Bearer authorization_uri="https://login.windows.net/", error="invalid_token", error_description="{message}"'
    return ArmError(401, code, message, headers={"WWW-Authenticate": challenge})


def _b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _unb64(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
