//! Accepts the agent and nobody else, and answers its requests one after another.

use std::error::Error;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use blixard_ipc::{Connection, IpcError, Listener};
use blixard_netd_api::{Problem, ProblemKind, Reply, Request};
use tracing::{debug, info, warn};

use crate::error::ChangeError;
use crate::node::Node;

/// Most connections at a time; a further one waits until one of them ends.
const CONNECTIONS_MAX: usize = 8;
/// Largest request in bytes: a nic with all its addresses needs less than 1 KiB.
const REQUEST_BYTES_MAX: usize = 16 << 10;
/// How long a connection may be silent between requests.
const SILENCE_MAX: Duration = Duration::from_secs(3);
/// How long the agent may take to read a reply.
const REPLY_TIME_MAX: Duration = Duration::from_secs(10);

/// Serves until the listener fails.
///
/// # Errors
/// [`IpcError::Socket`] when no connection can be accepted any more.
pub fn serve(listener: &Listener, agent_uid: u32, node: Node) -> Result<(), IpcError> {
    let node = Arc::new(Mutex::new(node));
    let slots = Arc::new(Slots::default());
    loop {
        slots.take();
        let slot = Slot(Arc::clone(&slots));
        let connection = listener.accept()?;
        match connection.peer() {
            Ok(peer) if peer.uid == agent_uid => {}
            Ok(peer) => {
                warn!(peer.uid, peer.pid, "refused a connection that is not the agent's");
                continue;
            }
            Err(error) => {
                warn!(%error, "refused a connection from somebody unknown");
                continue;
            }
        }
        let node = Arc::clone(&node);
        let spawned = std::thread::Builder::new().name("connection".into()).spawn(move || {
            let _slot = slot;
            if let Err(error) = answer_all(&connection, &node) {
                debug!(%error, "connection ended");
            }
        });
        if let Err(error) = spawned {
            warn!(%error, "cannot start a thread for a connection");
        }
    }
}

fn answer_all(connection: &Connection, node: &Mutex<Node>) -> Result<(), IpcError> {
    while let Some(message) = connection.receive(REQUEST_BYTES_MAX, Some(Instant::now() + SILENCE_MAX))? {
        let request: Request = match message.decode() {
            Ok(request) => request,
            Err(error) => {
                // For an agent of another version: it shall know that asking again does not help.
                let problem = not_understood(&error);
                warn!(%problem, "refused");
                connection.send(&Reply::Refused(problem), &[], Instant::now() + REPLY_TIME_MAX)?;
                continue;
            }
        };
        let started = Instant::now();
        let (reply, tap) = {
            // Every request starts by asking the kernel: a panic of another one left nothing half known.
            let mut node = node.lock().unwrap_or_else(PoisonError::into_inner);
            let result = answer(&node, &request);
            if result.as_ref().is_err_and(ChangeError::is_lost_connection) {
                reconnect(&mut node);
            }
            result.unwrap_or_else(|error| (Reply::Refused(Problem::from(error)), None))
        };
        let microseconds = started.elapsed().as_micros();
        match &reply {
            Reply::Refused(problem) => warn!(?request, %problem, microseconds, "refused"),
            Reply::Inventory(_) => debug!(microseconds, "listed"),
            _ => info!(?request, microseconds, "done"),
        }
        let descriptors: Vec<_> = tap.iter().map(AsFd::as_fd).collect();
        connection.send(&reply, &descriptors, Instant::now() + REPLY_TIME_MAX)?;
    }
    Ok(())
}

fn answer(node: &Node, request: &Request) -> Result<(Reply, Option<OwnedFd>), ChangeError> {
    let done = |()| (Reply::Done, None);
    match request {
        Request::EnsureNetwork(spec) => node.ensure_network(spec).map(done),
        Request::RemoveNetwork { name } => node.remove_network(name).map(done),
        Request::EnsureNic { spec, open } => node.ensure_nic(spec, *open).map(|tap| match tap {
            Some(tap) => (Reply::Tap, Some(tap)),
            None => (Reply::Done, None),
        }),
        Request::RemoveNic { id } => node.remove_nic(id).map(done),
        Request::List => node.list().map(|inventory| (Reply::Inventory(inventory), None)),
    }
}

fn not_understood(error: &IpcError) -> Problem {
    let cause = error.source().map(ToString::to_string).unwrap_or_default();
    Problem { kind: ProblemKind::Invalid, message: format!("netd does not understand this request: {cause}") }
}

/// A connection that once gave no answer may give none ever again, or the late one.
fn reconnect(node: &mut Node) {
    match Node::open() {
        Ok(fresh) => *node = fresh,
        Err(error) => warn!(%error, "cannot connect to the kernel again"),
    }
}

/// How many connections there are.
#[derive(Default)]
struct Slots {
    used: Mutex<usize>,
    freed: std::sync::Condvar,
}

impl Slots {
    fn take(&self) {
        let used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        let full = |used: &mut usize| *used >= CONNECTIONS_MAX;
        let mut used = self.freed.wait_while(used, full).unwrap_or_else(PoisonError::into_inner);
        *used += 1;
    }
}

/// One of the connections; given back when it is dropped.
struct Slot(Arc<Slots>);

impl Drop for Slot {
    fn drop(&mut self) {
        *self.0.used.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        self.0.freed.notify_one();
    }
}
