//! Waiting for a revision or for a VM to get somewhere: by the signal that follows each applied entry, never by asking
//! again and again.

use std::str::FromStr;
use std::time::Duration;

use blixard_api::health::HealthState;
use blixard_api::vm::Phase;
use blixard_api::{VmId, WAIT_MS_MAX};
use tokio::time::Instant;

use super::Api;
use super::error::Failure;
use super::query::Parameters;
use crate::state::VmRecord;

/// How long a read waits for its `min_revision` when it names no time.
const REVISION_WAIT_MS: u64 = 10_000;
/// How long a `wait` takes when it names no time.
const WAIT_MS: u64 = 60_000;

/// What is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Condition {
    /// The VM is in this phase, in its newest start.
    In(Phase),
    /// Its workload is so, in its newest start.
    Health(HealthState),
    /// The VM is gone.
    Gone,
}

impl FromStr for Condition {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        Ok(match text {
            "gone" => Self::Gone,
            "ready" | "running" => Self::In(Phase::Running),
            "healthy" => Self::Health(HealthState::Healthy),
            "unhealthy" => Self::Health(HealthState::Unhealthy),
            "pending" => Self::In(Phase::Pending),
            "preparing" => Self::In(Phase::Preparing),
            "starting" => Self::In(Phase::Starting),
            "paused" => Self::In(Phase::Paused),
            "suspended" => Self::In(Phase::Suspended),
            "stopping" => Self::In(Phase::Stopping),
            "stopped" => Self::In(Phase::Stopped),
            "failed" => Self::In(Phase::Failed),
            _ => return Err(()),
        })
    }
}

/// What a request waits for, from `wait` and `timeout_ms`.
///
/// # Errors
/// 422.
pub fn wanted(parameters: &Parameters) -> Result<Option<(Vec<Condition>, Duration)>, Failure> {
    let timeout = parameters.number("timeout_ms", 0, WAIT_MS_MAX)?.unwrap_or(WAIT_MS);
    let Some(text) = parameters.text("wait")? else { return Ok(None) };
    let conditions: Result<Vec<Condition>, ()> = text.split(',').map(str::parse).collect();
    let conditions = conditions.map_err(|()| {
        let form =
            "ready, healthy, unhealthy, gone and the names of phases (stopped, failed, …) are possible, separated by commas";
        Failure::field("wait", "bad_format", form)
    })?;
    Ok(Some((conditions, Duration::from_millis(timeout))))
}

fn met(conditions: &[Condition], vm: &VmRecord) -> bool {
    conditions.iter().any(|condition| match condition {
        Condition::In(phase) => vm.observed.phase == *phase,
        Condition::Health(state) => {
            vm.observed.start == vm.start && vm.observed.health.as_ref().is_some_and(|h| h.state == *state)
        }
        Condition::Gone => false,
    })
}

impl Api {
    /// Waits until this node knows all that was acknowledged anywhere before.
    ///
    /// # Errors
    /// 503 when no leader confirms it.
    pub async fn catch_up(&self) -> Result<(), Failure> {
        self.consensus.linearize().await.map_err(|error| {
            Failure::unavailable(error.to_string())
                .suggest("try again; blixard cluster status shows who leads")
        })
    }

    /// Waits until this node knows what the request asks for: a revision, or with `linearizable` all that was acknowledged
    /// anywhere before the request came.
    ///
    /// # Errors
    /// 408, or 503 when no leader confirms it.
    pub async fn at_least(&self, parameters: &Parameters) -> Result<(), Failure> {
        if parameters.flag("linearizable")? {
            self.catch_up().await?;
        }
        let Some(wanted) = parameters.number("min_revision", 0, u64::MAX)? else { return Ok(()) };
        let timeout = parameters.number("timeout_ms", 0, WAIT_MS_MAX)?.unwrap_or(REVISION_WAIT_MS);
        let mut revisions = self.consensus.replica().revisions();
        let reached = revisions.wait_for(|revision| *revision >= wanted);
        match tokio::time::timeout(Duration::from_millis(timeout), reached).await {
            Ok(Ok(_)) => Ok(()),
            _ => {
                let known = *self.consensus.replica().revisions().borrow();
                Err(Failure::timeout(format!("this node knows revision {known}, not yet {wanted}")))
            }
        }
    }

    /// Waits until a VM meets one of the conditions, or is gone.
    ///
    /// # Errors
    /// 408 with what it is doing, 503 when the node stops.
    pub async fn wait_for(&self, id: VmId, conditions: &[Condition], time: Duration) -> Result<(), Failure> {
        let deadline = Instant::now() + time;
        let mut revisions = self.consensus.replica().revisions();
        loop {
            revisions.mark_unchanged();
            let phase = match self.consensus.replica().state().vm(id) {
                None => return Ok(()),
                Some(vm) if met(conditions, vm) => return Ok(()),
                Some(vm) => vm.observed.phase,
            };
            tokio::select! {
                biased;
                changed = revisions.changed() => if changed.is_err() {
                    return Err(Failure::unavailable("this node is stopping"));
                },
                () = self.stop.cancelled() => return Err(Failure::unavailable("this node is stopping")),
                () = tokio::time::sleep_until(deadline) => {
                    return Err(Failure::timeout(format!("after {} ms it is still {phase}", time.as_millis())));
                }
            }
        }
    }
}
