//! Typed calls for the agent. Each call is a connection of its own: netd may have been restarted in between.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use blixard_ipc::{Connection, IpcError};

use crate::request::{Inventory, Problem, Reply, Request};
use crate::spec::{NetworkSpec, NicId, NicSpec};

/// Longest time a call may take.
const CALL_TIME_MAX: Duration = Duration::from_secs(10);

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum NetdError {
    /// netd cannot be reached.
    #[error("netd cannot be reached")]
    Unreachable(#[source] IpcError),
    /// netd refused.
    #[error("netd refused")]
    Refused(#[source] Problem),
    /// netd answered something else than was asked.
    #[error("netd answered something else than was asked")]
    Confused,
}

/// Where netd listens.
#[derive(Debug, Clone)]
pub struct NetdClient {
    socket: PathBuf,
}

impl NetdClient {
    /// A client of the netd that listens at `socket`.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self { socket: socket.into() }
    }

    /// See [`Request::EnsureNetwork`].
    ///
    /// # Errors
    /// See [`NetdError`].
    pub fn ensure_network(&self, spec: &NetworkSpec) -> Result<(), NetdError> {
        self.done(&Request::EnsureNetwork(spec.clone()))
    }

    /// See [`Request::RemoveNetwork`].
    ///
    /// # Errors
    /// See [`NetdError`].
    pub fn remove_network(&self, name: &str) -> Result<(), NetdError> {
        self.done(&Request::RemoveNetwork { name: name.into() })
    }

    /// Makes or repairs a nic and opens its TAP. See [`Request::EnsureNic`].
    ///
    /// # Errors
    /// See [`NetdError`].
    pub fn open_nic(&self, spec: &NicSpec) -> Result<OwnedFd, NetdError> {
        match self.call(&Request::EnsureNic { spec: spec.clone(), open: true })? {
            (Reply::Tap, descriptors) => descriptors.into_iter().next().ok_or(NetdError::Confused),
            _ => Err(NetdError::Confused),
        }
    }

    /// Makes or repairs a nic whose TAP is open elsewhere. See [`Request::EnsureNic`].
    ///
    /// # Errors
    /// See [`NetdError`].
    pub fn ensure_nic(&self, spec: &NicSpec) -> Result<(), NetdError> {
        self.done(&Request::EnsureNic { spec: spec.clone(), open: false })
    }

    /// See [`Request::RemoveNic`].
    ///
    /// # Errors
    /// See [`NetdError`].
    pub fn remove_nic(&self, id: &NicId) -> Result<(), NetdError> {
        self.done(&Request::RemoveNic { id: id.clone() })
    }

    /// See [`Request::List`].
    ///
    /// # Errors
    /// See [`NetdError`].
    pub fn list(&self) -> Result<Inventory, NetdError> {
        match self.call(&Request::List)? {
            (Reply::Inventory(inventory), _) => Ok(inventory),
            _ => Err(NetdError::Confused),
        }
    }

    fn done(&self, request: &Request) -> Result<(), NetdError> {
        match self.call(request)? {
            (Reply::Done, _) => Ok(()),
            _ => Err(NetdError::Confused),
        }
    }

    fn call(&self, request: &Request) -> Result<(Reply, Vec<OwnedFd>), NetdError> {
        let connection = Connection::connect(&self.socket).map_err(NetdError::Unreachable)?;
        let deadline = Instant::now() + CALL_TIME_MAX;
        match connection.call(request, &[], deadline).map_err(NetdError::Unreachable)? {
            (Reply::Refused(problem), _) => Err(NetdError::Refused(problem)),
            answer => Ok(answer),
        }
    }
}
