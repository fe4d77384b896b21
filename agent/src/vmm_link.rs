//! The control connection to each running VMM, and the one thread that hears of their events and ends.
//!
//! One request or event is one JSON datagram (see `blixard_vmm_api::control`). What a VMM sends is hostile: bounded in size,
//! and nothing of it is believed but what concerns its own VM.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use blixard_vmm_api::VmId;
use blixard_vmm_api::control::{Event, FromVmm, MESSAGE_BYTES_MAX, Reply, Request, Status};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, recv, send, socket};

use crate::host::{Host, Vm, Vmm};
use crate::launch::CONTROL_SOCKET;
use crate::{lease, process};

/// Longest text of a guest that is kept, in characters.
const TEXT_MAX: usize = 300;
/// Longest end of the output of a health check that is kept, in characters.
const OUTPUT_CHARS_MAX: usize = 512;
/// How long to wait before connecting again to a VMM that closed the connection.
const RECONNECT: Duration = Duration::from_millis(500);

/// A control connection.
#[derive(Debug)]
pub struct Link {
    fd: OwnedFd,
}

impl Link {
    /// Connects to the control socket of a VMM and subscribes to its events.
    ///
    /// # Errors
    /// The system's answer.
    pub fn subscribe(path: &Path) -> io::Result<Self> {
        // Without blocking: a VMM that accepts nothing must not hold up the agent.
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
        connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
        let link = Self { fd };
        link.send(&Request::Subscribe)?;
        Ok(link)
    }

    /// Sends a request; the answer comes as an event of the connection.
    ///
    /// # Errors
    /// The system's answer, for example when the VMM does not read.
    pub fn send(&self, request: &Request) -> io::Result<()> {
        let bytes = serde_json::to_vec(request).map_err(io::Error::other)?;
        send(self.fd.as_raw_fd(), &bytes, MsgFlags::MSG_NOSIGNAL)?;
        Ok(())
    }

    /// The next message, if one has come.
    ///
    /// # Errors
    /// The connection is over.
    fn receive(&self) -> io::Result<Option<FromVmm>> {
        let mut buffer = vec![0; MESSAGE_BYTES_MAX];
        match recv(self.fd.as_raw_fd(), &mut buffer, MsgFlags::MSG_TRUNC) {
            Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(length) => {
                let bytes = buffer.get(..length).ok_or(io::ErrorKind::FileTooLarge)?;
                serde_json::from_slice(bytes).map(Some).map_err(io::Error::other)
            }
            Err(Errno::EAGAIN | Errno::EINTR) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }
}

#[derive(Debug, Clone)]
enum Watched {
    Process(VmId, Arc<Vmm>),
    Link(VmId, Arc<Link>),
}

/// What is listened to.
#[derive(Debug)]
pub struct Watch {
    epoll: Epoll,
    next: AtomicU64,
    watched: Mutex<HashMap<u64, Watched>>,
}

impl Watch {
    /// Listens to nothing yet.
    ///
    /// # Errors
    /// The system's answer.
    pub fn new() -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        Ok(Self { epoll, next: AtomicU64::new(1), watched: Mutex::default() })
    }

    fn watched(&self) -> MutexGuard<'_, HashMap<u64, Watched>> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, what: Watched) -> io::Result<()> {
        let token = self.next.fetch_add(1, Ordering::Relaxed);
        // Known before the first event can come.
        self.watched().insert(token, what.clone());
        let event = EpollEvent::new(EpollFlags::EPOLLIN, token);
        let added = match &what {
            Watched::Process(_, vmm) => self.epoll.add(vmm.process.as_fd(), event),
            Watched::Link(_, link) => self.epoll.add(link.fd.as_fd(), event),
        };
        if added.is_err() {
            self.watched().remove(&token);
        }
        Ok(added?)
    }

    fn drop_token(&self, token: u64) {
        if let Some(what) = self.watched().remove(&token) {
            let _ = match &what {
                Watched::Process(_, vmm) => self.epoll.delete(vmm.process.as_fd()),
                Watched::Link(_, link) => self.epoll.delete(link.fd.as_fd()),
            };
        }
    }

    fn drop_links_of(&self, vm: VmId) {
        let links: Vec<u64> = {
            let watched = self.watched();
            let of_vm = |what: &Watched| matches!(what, Watched::Link(of, _) if *of == vm);
            watched.iter().filter(|(_, what)| of_vm(what)).map(|(token, _)| *token).collect()
        };
        for token in links {
            self.drop_token(token);
        }
    }
}

/// Makes a VMM the VM's: hears of its end, and connects to it.
///
/// # Errors
/// Its end could not be heard of.
pub fn attach(host: &Host, vm: VmId, vmm: Vmm) -> io::Result<()> {
    let vmm = Arc::new(vmm);
    host.change(vm, |entry| {
        entry.process = Some(Arc::clone(&vmm));
        entry.frozen = None;
        entry.ending = None;
        entry.status = None;
        entry.outcome = None;
    });
    lease::catch_up(host, vm);
    host.watch.add(Watched::Process(vm, vmm))?;
    reconnect(host, vm);
    Ok(())
}

/// Connects to the VMM of a VM; when it cannot be reached, it is tried again soon.
pub fn reconnect(host: &Host, vm: VmId) {
    let path = host.config.sockets_of(vm).join(CONTROL_SOCKET);
    let link = Link::subscribe(&path).and_then(|link| {
        let link = Arc::new(link);
        host.watch.add(Watched::Link(vm, Arc::clone(&link)))?;
        Ok(link)
    });
    match link {
        Ok(link) => host.change(vm, |entry| entry.link = Some(link)),
        Err(error) => {
            tracing::debug!(%vm, %error, "cannot connect to the VMM");
            host.look_at(Instant::now() + RECONNECT, vm);
        }
    }
}

/// Hears of events and ends, for as long as the agent lives.
pub fn run(host: &Host) {
    let mut events = [EpollEvent::empty(); 64];
    loop {
        let count = match host.watch.epoll.wait(&mut events, EpollTimeout::NONE) {
            Ok(count) => count,
            Err(Errno::EINTR) => continue,
            Err(errno) => {
                tracing::error!(%errno, "cannot wait for events of VMMs");
                return;
            }
        };
        for event in events.iter().take(count) {
            let token = event.data();
            let what = host.watch.watched().get(&token).cloned();
            match what {
                Some(Watched::Process(vm, vmm)) => {
                    host.watch.drop_token(token);
                    ended(host, vm, &vmm);
                }
                Some(Watched::Link(vm, link)) => hear(host, vm, &link, token),
                None => {}
            }
        }
    }
}

fn ended(host: &Host, vm: VmId, vmm: &Arc<Vmm>) {
    let mut outcome = process::outcome(&vmm.process).unwrap_or_else(|| "nobody saw how".into());
    if let Some(said) = vmm.said.as_ref().and_then(|said| said.last_line()) {
        outcome = format!("{outcome}; it said: {said}");
    }
    tracing::info!(%vm, pid = vmm.pid, outcome, "VMM ended");
    host.watch.drop_links_of(vm);
    host.change(vm, |entry| {
        if entry.process.as_ref().is_some_and(|p| p.pid == vmm.pid) {
            entry.process = None;
            entry.link = None;
            entry.outcome = Some(outcome);
        }
    });
}

fn hear(host: &Host, vm: VmId, link: &Arc<Link>, token: u64) {
    match link.receive() {
        Ok(None) => {}
        Ok(Some(FromVmm::Reply(Reply::Status(status)) | FromVmm::Event(Event::Changed(status)))) => {
            host.change(vm, |entry| take(entry, status));
        }
        Ok(Some(FromVmm::Reply(Reply::Refused { reason }))) => {
            tracing::warn!(%vm, reason = printable(&reason), "the VMM refused a request");
        }
        Ok(Some(FromVmm::Event(Event::Exited(_)) | FromVmm::Reply(_))) => {}
        Err(error) => {
            tracing::debug!(%vm, %error, "control connection is over");
            host.watch.drop_token(token);
            host.change(vm, |entry| {
                if entry.link.as_ref().is_some_and(|of| Arc::ptr_eq(of, link)) {
                    entry.link = None;
                }
            });
            // Mostly the VMM is about to end; if not, it is connected to again.
            host.look_at(Instant::now() + RECONNECT, vm);
        }
    }
}

/// Takes a status over. It never becomes less: what was ready was ready.
fn take(entry: &mut Vm, mut status: Status) {
    if entry.process.is_none() {
        return;
    }
    status.guest_problem = status.guest_problem.map(|text| printable(&text));
    if let Some(health) = &mut status.health {
        health.output = end_of(&health.output);
    }
    entry.status = Some(status);
}

/// The end of the output of a check, as lines.
fn end_of(output: &str) -> String {
    let kept = |c: &char| !c.is_control() || *c == '\n' || *c == '\t';
    let all = output.chars().filter(kept).count();
    output.chars().filter(kept).skip(all.saturating_sub(OUTPUT_CHARS_MAX)).collect()
}

/// A text of a guest or VMM, fit for a log line.
pub fn printable(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(TEXT_MAX).collect()
}
