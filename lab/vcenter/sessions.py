"""Sessions: login, cookie, idle expiry on a settable clock, kill. Views, filters and collectors die with them."""

from __future__ import annotations

import secrets
import threading
import time
import uuid
from typing import TYPE_CHECKING, Any

from farshore.lab.vcenter.faults import HttpStatusError
from farshore.lab.vcenter.objects import Managed, wsdl
from farshore.lab.vcenter.vim import array, make_fault, utc, vim

if TYPE_CHECKING:
    from farshore.lab.vcenter.service import LabVCenter

COOKIE = "vmware_soap_session"


class Session:
    """One login. `cookie` authenticates; `key` is what the API shows."""

    def __init__(self, user: str, agent: str, now: float) -> None:
        self.cookie = secrets.token_hex(20)
        self.key = str(uuid.uuid4())
        self.user = user
        self.agent = agent
        self.login_time = time.time()
        self.last_used = now
        self.calls = 0
        self.waiting = 0
        """Calls in progress: a session in use does not expire."""
        self.alive = True
        self.objects: dict[str, Managed] = {}

    def to_vim(self) -> Any:
        return vim.UserSession(
            key=self.key,
            userName=self.user,
            fullName=self.user.partition("@")[0],
            loginTime=utc(self.login_time),
            lastActiveTime=utc(time.time()),
            locale="en",
            messageLocale="en",
            extensionSession=False,
            ipAddress="127.0.0.1",
            userAgent=self.agent,
            callCount=self.calls,
        )


class Sessions:
    """All sessions. They end with the process, as those of a real vCenter end with its service."""

    def __init__(self, lab: LabVCenter) -> None:
        self._lab = lab
        self._lock = threading.Lock()
        self._by_cookie: dict[str, Session] = {}
        self.offset = 0.0
        """Seconds that the sessions' clock is ahead of real time."""

    def now(self) -> float:
        return time.monotonic() + self.offset

    def open(self, user: str, agent: str) -> Session:
        """Log in. Raises `HttpStatusError` (503) when there are too many."""
        self._reap()
        limit = self._lab.settings.max_sessions
        with self._lock:
            if limit and len(self._by_cookie) >= limit:
                raise HttpStatusError(503)
            session = Session(user, agent, self.now())
            self._by_cookie[session.cookie] = session
        return session

    def find(self, cookie: str | None, *, use: bool = True) -> Session | None:
        """The living session of a cookie; `use` restarts its idle clock."""
        self._reap()
        with self._lock:
            session = self._by_cookie.get(cookie) if cookie else None
            if session is not None and use:
                session.last_used = self.now()
        return session

    def all(self) -> list[Session]:
        self._reap()
        with self._lock:
            return list(self._by_cookie.values())

    def end(self, session: Session) -> None:
        """Log out or kill."""
        with self._lock:
            self._by_cookie.pop(session.cookie, None)
        session.alive = False
        for item in list(session.objects.values()):
            self._lab.forget(item)
        session.objects.clear()
        self._lab.wake()

    def kill(self, user: str | None = None) -> int:
        """End all sessions (of a user); return how many."""
        doomed = [s for s in self.all() if user in (None, s.user)]
        for session in doomed:
            self.end(session)
        return len(doomed)

    def _reap(self) -> None:
        deadline = self.now() - self._lab.settings.idle_timeout
        with self._lock:
            dead = [s for s in self._by_cookie.values() if s.last_used < deadline and not s.waiting]
        for session in dead:
            self.end(session)


class SessionManager(Managed):
    """`SessionManager`."""

    vtype = vim.SessionManager

    def p_currentSession(self) -> Any:
        session = self.lab.calls.session
        return session.to_vim() if session else None

    def p_sessionList(self) -> Any:
        return array(vim.UserSession, [s.to_vim() for s in self.lab.sessions.all()])

    def p_defaultLocale(self) -> Any:
        return "en"

    def p_supportedLocaleList(self) -> Any:
        return array(str, ["en"])

    def p_messageLocaleList(self) -> Any:
        return array(str, ["en"])

    @wsdl
    def Login(self, userName: str = "", password: str = "", locale: str | None = None) -> Any:
        known = self.lab.credentials.get(userName)
        if known is None or not secrets.compare_digest(known.encode(), password.encode()):
            raise make_fault(
                "vim.fault.InvalidLogin", "Cannot complete login due to an incorrect user name or password."
            )
        session = self.lab.sessions.open(userName, self.lab.calls.agent)
        self.lab.calls.session = session
        self.lab.calls.set_cookie = session.cookie
        return session.to_vim()

    @wsdl
    def Logout(self) -> None:
        session = self.lab.calls.session
        if session is not None:
            self.lab.sessions.end(session)

    @wsdl
    def SessionIsActive(self, sessionID: str, userName: str) -> bool:
        return any(s.key == sessionID and s.user == userName for s in self.lab.sessions.all())

    @wsdl
    def TerminateSession(self, sessionId: Any) -> None:
        keys = {s.key: s for s in self.lab.sessions.all()}
        for key in sessionId:
            if key not in keys:
                raise make_fault("vim.fault.NotFound", "No such session.")
            self.lab.sessions.end(keys[key])
