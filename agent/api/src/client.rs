//! Typed calls for the node. Each call is a connection of its own: the agent may have been restarted in between.

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use blixard_ipc::{Connection, IpcError};
use blixard_vmm_api::VmId;
use blixard_vmm_api::stats::Sample;

use crate::blob::BlobRef;
use crate::plan::{Generation, HostPlan};
use crate::report::HostReport;
use crate::request::{Finding, OBSERVE_WAIT_MS_MAX, Problem, Reply, Request};

/// Longest time an ordinary call may take.
const CALL_TIME_MAX: Duration = Duration::from_secs(20);
/// Longest time that copying content may take.
const PUT_TIME_MAX: Duration = Duration::from_secs(600);

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The agent cannot be reached.
    #[error("the agent cannot be reached")]
    Unreachable(#[source] IpcError),
    /// The agent refused.
    #[error("the agent refused")]
    Refused(#[source] Problem),
    /// The agent answered something else than was asked.
    #[error("the agent answered something else than was asked")]
    Confused,
}

/// Where the agent listens. Calls block: async callers use a thread of their own.
#[derive(Debug, Clone)]
pub struct AgentClient {
    socket: PathBuf,
}

impl AgentClient {
    /// A client of the agent that listens at `socket`.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self { socket: socket.into() }
    }

    /// See [`Request::Apply`].
    ///
    /// # Errors
    /// See [`AgentError`].
    pub fn apply(&self, plan: HostPlan) -> Result<HostReport, AgentError> {
        report(self.call(&Request::Apply(plan), None, CALL_TIME_MAX)?)
    }

    /// See [`Request::Observe`].
    ///
    /// # Errors
    /// See [`AgentError`].
    pub fn observe(
        &self,
        agent_instance: u64,
        revision: u64,
        wait_ms: u64,
    ) -> Result<HostReport, AgentError> {
        let wait_ms = wait_ms.min(OBSERVE_WAIT_MS_MAX);
        let time = CALL_TIME_MAX + Duration::from_millis(wait_ms);
        report(self.call(&Request::Observe { agent_instance, revision, wait_ms }, None, time)?)
    }

    /// See [`Request::Renew`].
    ///
    /// # Errors
    /// See [`AgentError`].
    pub fn renew(&self, until_ms: Option<u64>, generation: Generation) -> Result<(), AgentError> {
        match self.call(&Request::Renew { until_ms, generation }, None, CALL_TIME_MAX)? {
            (Reply::Done, _) => Ok(()),
            _ => Err(AgentError::Confused),
        }
    }

    /// See [`Request::PutBlob`].
    ///
    /// # Errors
    /// See [`AgentError`].
    pub fn put_blob(&self, blob: BlobRef, file: &impl AsFd) -> Result<(), AgentError> {
        match self.call(&Request::PutBlob(blob), Some(file.as_fd()), PUT_TIME_MAX)? {
            (Reply::Done, _) => Ok(()),
            _ => Err(AgentError::Confused),
        }
    }

    /// See [`Request::OpenExec`].
    ///
    /// # Errors
    /// See [`AgentError`].
    pub fn open_exec(&self, vm: VmId) -> Result<OwnedFd, AgentError> {
        stream(self.call(&Request::OpenExec { vm }, None, CALL_TIME_MAX)?)
    }

    /// See [`Request::OpenConsole`].
    ///
    /// # Errors
    /// See [`AgentError`].
    pub fn open_console(&self, vm: VmId) -> Result<OwnedFd, AgentError> {
        stream(self.call(&Request::OpenConsole { vm }, None, CALL_TIME_MAX)?)
    }

    /// See [`Request::OpenLog`].
    ///
    /// # Errors
    /// See [`AgentError`].
    pub fn open_log(&self, vm: VmId) -> Result<OwnedFd, AgentError> {
        stream(self.call(&Request::OpenLog { vm }, None, CALL_TIME_MAX)?)
    }

    /// See [`Request::Metrics`].
    ///
    /// # Errors
    /// See [`AgentError`].
    pub fn metrics(&self, vm: VmId) -> Result<Vec<Sample>, AgentError> {
        match self.call(&Request::Metrics { vm }, None, CALL_TIME_MAX)? {
            (Reply::Metrics(samples), _) => Ok(samples),
            _ => Err(AgentError::Confused),
        }
    }

    /// See [`Request::Doctor`].
    ///
    /// # Errors
    /// See [`AgentError`].
    pub fn doctor(&self) -> Result<Vec<Finding>, AgentError> {
        match self.call(&Request::Doctor, None, CALL_TIME_MAX)? {
            (Reply::Findings(findings), _) => Ok(findings),
            _ => Err(AgentError::Confused),
        }
    }

    fn call(
        &self,
        request: &Request,
        descriptor: Option<std::os::fd::BorrowedFd<'_>>,
        time: Duration,
    ) -> Result<(Reply, Vec<OwnedFd>), AgentError> {
        let connection = Connection::connect(&self.socket).map_err(AgentError::Unreachable)?;
        let deadline = Instant::now() + time;
        match connection.call(request, descriptor.as_slice(), deadline).map_err(AgentError::Unreachable)? {
            (Reply::Refused(problem), _) => Err(AgentError::Refused(problem)),
            answer => Ok(answer),
        }
    }
}

fn report(answer: (Reply, Vec<OwnedFd>)) -> Result<HostReport, AgentError> {
    match answer {
        (Reply::Report(report), _) => Ok(*report),
        _ => Err(AgentError::Confused),
    }
}

fn stream(answer: (Reply, Vec<OwnedFd>)) -> Result<OwnedFd, AgentError> {
    match answer {
        (Reply::Stream, descriptors) => descriptors.into_iter().next().ok_or(AgentError::Confused),
        _ => Err(AgentError::Confused),
    }
}
