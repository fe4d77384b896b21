//! This node's dialogue with its agent: plan down, reports up.
//!
//! * [`plan`]: pure, state → [`HostPlan`]
//! * [`feed`]: the stream of this node's plan, from the replica here or later from elsewhere
//! * [`local`]: what this node knows of its VMs and keeps to itself (usage, moments, whether the agent answers)
//! * [`renew`]: the lease of this host
//! * [`held`]: the same, in a file, for when the agent does not answer
//! * [`sync`]: the loops

pub mod feed;
pub mod held;
pub mod local;
pub mod plan;
pub mod renew;
pub mod sync;

use std::fs::File;
use std::os::fd::OwnedFd;

use blixard_agent_api::{AgentClient, AgentError, BlobRef, Finding, Generation, HostPlan, HostReport};
use blixard_api::VmId;
use blixard_vmm_api::stats::Sample;
use futures::FutureExt;
use futures::future::BoxFuture;

/// An answer of the agent that is waited for, or the error (see [`AgentError`]).
pub type Asked<T> = BoxFuture<'static, Result<T, AgentError>>;

/// What a node asks of its agent. What is asked all the time is waited for without a thread, so that a simulation can answer it
/// in its own time; the other calls block.
pub trait Agent: Send + Sync + 'static {
    /// Store this plan and work toward it.
    fn apply(&self, plan: HostPlan) -> Asked<HostReport>;
    /// The report, as soon as it is newer than this one, or after `wait_ms`.
    fn observe(&self, agent_instance: u64, revision: u64, wait_ms: u64) -> Asked<HostReport>;
    /// VMs that may be started elsewhere may run until this moment of CLOCK_BOOTTIME, if the agent's plan is this new.
    fn renew(&self, until_ms: Option<u64>, generation: Generation) -> Asked<()>;
    /// Keep this content.
    ///
    /// # Errors
    /// See [`AgentError`].
    fn put_blob(&self, blob: BlobRef, file: &File) -> Result<(), AgentError>;
    /// A stream to the exec port of a guest.
    ///
    /// # Errors
    /// See [`AgentError`].
    fn open_exec(&self, vm: VmId) -> Result<OwnedFd, AgentError>;
    /// A stream to the console of a VM.
    ///
    /// # Errors
    /// See [`AgentError`].
    fn open_console(&self, vm: VmId) -> Result<OwnedFd, AgentError>;
    /// The console log of a VM.
    ///
    /// # Errors
    /// See [`AgentError`].
    fn open_log(&self, vm: VmId) -> Result<OwnedFd, AgentError>;
    /// What the VMM of a VM counts.
    ///
    /// # Errors
    /// See [`AgentError`].
    fn metrics(&self, vm: VmId) -> Result<Vec<Sample>, AgentError>;
    /// Look at the host.
    ///
    /// # Errors
    /// See [`AgentError`].
    fn doctor(&self) -> Result<Vec<Finding>, AgentError>;
}

fn blocking<T: Send + 'static>(call: impl FnOnce() -> Result<T, AgentError> + Send + 'static) -> Asked<T> {
    let called = tokio::task::spawn_blocking(call);
    async { called.await.unwrap_or(Err(AgentError::Confused)) }.boxed()
}

impl Agent for AgentClient {
    fn apply(&self, plan: HostPlan) -> Asked<HostReport> {
        let agent = self.clone();
        blocking(move || agent.apply(plan))
    }

    fn observe(&self, agent_instance: u64, revision: u64, wait_ms: u64) -> Asked<HostReport> {
        let agent = self.clone();
        blocking(move || agent.observe(agent_instance, revision, wait_ms))
    }

    fn renew(&self, until_ms: Option<u64>, generation: Generation) -> Asked<()> {
        let agent = self.clone();
        blocking(move || agent.renew(until_ms, generation))
    }

    fn put_blob(&self, blob: BlobRef, file: &File) -> Result<(), AgentError> {
        self.put_blob(blob, file)
    }

    fn open_exec(&self, vm: VmId) -> Result<OwnedFd, AgentError> {
        self.open_exec(vm)
    }

    fn open_console(&self, vm: VmId) -> Result<OwnedFd, AgentError> {
        self.open_console(vm)
    }

    fn open_log(&self, vm: VmId) -> Result<OwnedFd, AgentError> {
        self.open_log(vm)
    }

    fn metrics(&self, vm: VmId) -> Result<Vec<Sample>, AgentError> {
        self.metrics(vm)
    }

    fn doctor(&self) -> Result<Vec<Finding>, AgentError> {
        self.doctor()
    }
}

/// An error with its causes, as one sentence.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
