//! Following one VM through its life: phases as they come, the moment that is waited for, how it ended.

use std::time::{Duration, Instant};

use blixard_api::client::{Client, Wait};
use blixard_api::vm::{Phase, VmView};
use blixard_vmm_api::ExitReason;

use crate::error::{CliError, code};
use crate::progress::Progress;
use crate::units::show_short;

/// Longest time of one request; a longer wait is several.
const ONE_WAIT: Duration = Duration::from_secs(300);

/// A VM of a project, as it is named in requests.
#[derive(Clone, Copy)]
pub struct Subject<'a> {
    pub client: &'a Client,
    pub project: &'a str,
    pub name: &'a str,
}

/// It has ended, or will never begin.
pub fn ended(view: &VmView) -> bool {
    matches!(view.phase, Phase::Stopped | Phase::Failed)
}

impl Subject<'_> {
    /// Waits for one of some moments; `None`: as long as it takes.
    pub async fn wait(&self, until: &[&str], time: Option<Duration>) -> Result<VmView, CliError> {
        let begin = Instant::now();
        loop {
            let left = time.map(|t| t.saturating_sub(begin.elapsed()));
            let one = left.map_or(ONE_WAIT, |l| l.min(ONE_WAIT));
            let wait = Wait { until: until.iter().map(|u| (*u).to_owned()).collect(), time: one };
            match self.client.wait_vm(self.project, self.name, &wait).await {
                Err(error) if error.status() == Some(408) && left.is_none_or(|l| l > ONE_WAIT) => {}
                Err(error) if error.status() == Some(408) => {
                    return Err(self.late(until, time.unwrap_or(begin.elapsed())).await);
                }
                other => return Ok(other?),
            }
        }
    }

    /// Waits until the guest is ready. A VM that has already ended is fine (its work may be short), unless its guest did
    /// not end in good order before it said how its work ended.
    pub async fn wait_ready(&self, time: Duration, progress: &Progress) -> Result<VmView, CliError> {
        let begin = Instant::now();
        let mut view = self.client.vm(self.project, self.name).await?;
        loop {
            progress.step(&view.phase.to_string());
            match view.phase {
                Phase::Failed => return Err(failed(&view)),
                Phase::Pending | Phase::Preparing | Phase::Starting => {}
                Phase::Stopped => return exit_code(&view).map_err(|_| failed(&view)).map(|_| view),
                _ => return Ok(view),
            }
            let left = time.saturating_sub(begin.elapsed());
            let until: Vec<&str> = PHASES.iter().filter(|(p, _)| *p != view.phase).map(|(_, n)| *n).collect();
            view = match self.wait(&until, Some(left)).await {
                Err(CliError::Vm { code: code::TIMEOUT, .. }) => {
                    return Err(self.late(&["ready"], time).await);
                }
                other => other?,
            };
        }
    }

    /// Waits until it is removed.
    pub async fn wait_gone(&self, time: Duration) -> Result<(), CliError> {
        match self.wait(&["gone"], Some(time)).await {
            Ok(_) => Ok(()),
            Err(CliError::Client(error)) if error.status() == Some(404) => Ok(()),
            Err(error) => Err(error),
        }
    }

    async fn late(&self, until: &[&str], time: Duration) -> CliError {
        let now = match self.client.vm(self.project, self.name).await {
            Ok(view) => {
                let reason = view.reason.map(|r| format!(" ({r})")).unwrap_or_default();
                format!("it is {}{reason}", view.phase)
            }
            Err(_) => "it cannot be asked now".into(),
        };
        CliError::Vm {
            message: format!(
                "VM {:?} was not {} within {}: {now}",
                self.name,
                until.join(" or "),
                show_short(time)
            ),
            suggestion: format!("blixard logs {0}; blixard inspect {0}; a longer --timeout", self.name),
            code: code::TIMEOUT,
        }
    }
}

const PHASES: [(Phase, &str); 9] = [
    (Phase::Pending, "pending"),
    (Phase::Preparing, "preparing"),
    (Phase::Starting, "starting"),
    (Phase::Running, "running"),
    (Phase::Paused, "paused"),
    (Phase::Suspended, "suspended"),
    (Phase::Stopping, "stopping"),
    (Phase::Stopped, "stopped"),
    (Phase::Failed, "failed"),
];

/// The error that a failed VM is.
pub fn failed(view: &VmView) -> CliError {
    let exit = view.exit.as_ref().map(ToString::to_string);
    let reason = view.reason.clone().or(exit).unwrap_or_else(|| "no reason is known".into());
    CliError::Vm {
        message: format!("VM {:?} failed: {reason}", view.name),
        suggestion: format!("blixard logs {0}; blixard inspect {0}", view.name),
        code: code::ERROR,
    }
}

/// The exit code of a VM that has ended: its workload's, as a shell says it.
pub fn exit_code(view: &VmView) -> Result<u8, CliError> {
    match (&view.workload, view.phase, &view.exit) {
        (Some(workload), ..) => Ok(workload.shell_code()),
        (None, Phase::Failed, _) => Err(CliError::Own(Box::new(failed(view)))),
        (None, _, Some(ExitReason::PowerOff) | None) => Ok(0),
        // As a shell says that SIGKILL ended a program.
        (None, _, Some(ExitReason::Killed)) => Ok(137),
        (None, _, Some(_)) => Err(CliError::Own(Box::new(failed(view)))),
    }
}
