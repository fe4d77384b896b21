//! The end of a guest: everything ends in good order, and the power goes off.

use std::time::Duration;

use blixard_vmm_api::guest::LinkRecord;
use nix::sys::reboot::{RebootMode, reboot};

use crate::Guest;
use crate::{console, sys};

/// How long all processes may take to end after SIGTERM.
const GRACE: Duration = Duration::from_secs(2);
/// How long each later step may take: nothing that happens in the guest may keep it from ending.
const STEP: Duration = Duration::from_secs(2);

/// Ends everything and powers off.
pub fn off(guest: &Guest) -> ! {
    if let Some(checks) = &guest.checks {
        checks.close();
    }
    if let Some(children) = &guest.children {
        // A stopped process hears SIGTERM when it goes on; interactive shells ignore it, but not SIGHUP.
        for signal in [libc::SIGTERM, libc::SIGCONT, libc::SIGHUP] {
            let _none_left = sys::kill(-1, signal);
        }
        if !children.wait_for_none(GRACE) {
            let _none_left = sys::kill(-1, libc::SIGKILL);
            if !children.wait_for_none(STEP) {
                console::line("some processes do not end");
            }
        }
    }
    if let Some(executor) = &guest.executor {
        executor.close(STEP);
    }
    if let Some(link) = &guest.link
        && !link.flush(STEP)
    {
        console::line("the host does not take the last messages");
    }
    nix::unistd::sync();
    if let Some(volume) = &guest.volume
        && let Err(error) = volume.close()
    {
        console::line(&format!("the volume is written out, but stays writable: {error}"));
        nix::unistd::sync();
    }
    now()
}

/// Powers off at once.
pub fn now() -> ! {
    loop {
        let Err(error) = reboot(RebootMode::RB_POWER_OFF);
        console::line(&format!("the power does not go off: {error}"));
        // PID 1 must not end; without power management this is all that is left.
        nix::unistd::pause();
    }
}

/// For a bug in init: a PID 1 that dies is a kernel panic with a reason that nobody understands.
pub fn off_on_panic() {
    std::panic::set_hook(Box::new(|panic| {
        console::line(&format!("internal error: {panic}"));
        nix::unistd::sync();
        now()
    }));
}

/// Tells the host why the guest ends early, on the link and on the console.
pub fn complain(guest: &Guest, problem: &str) {
    console::line(problem);
    if let Some(link) = &guest.link {
        link.tell(LinkRecord::Problem(problem.into()));
    }
}
