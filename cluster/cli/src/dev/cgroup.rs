//! The cgroup that `dev` makes for the agent's VMs.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::output::Output;

/// Where cgroup v2 is mounted by convention.
const MOUNT: &str = "/sys/fs/cgroup";
/// Controllers that the agent needs.
const NEEDED: [&str; 3] = ["cpu", "memory", "pids"];
/// Controllers that it uses when they are there.
const WELCOME: [&str; 2] = ["io", "cpuset"];

/// Makes a cgroup of its own for the agent; `None` when this host cannot, and then says why.
pub fn prepare(output: Output) -> Option<PathBuf> {
    match make(Path::new(MOUNT)) {
        Ok(path) => Some(path),
        Err(why) => {
            output.note(&format!("dev   | VMs run without limits on processor and memory: {why}"));
            None
        }
    }
}

fn make(mount: &Path) -> Result<PathBuf, String> {
    let there = fs::read_to_string(mount.join("cgroup.controllers"))
        .map_err(|_| "no cgroup v2 (boot with systemd.unified_cgroup_hierarchy=1)".to_owned())?;
    let there: Vec<&str> = there.split_whitespace().collect();
    if let Some(missing) = NEEDED.iter().find(|c| !there.contains(c)) {
        return Err(format!("no cgroup v2 controller {missing} here"));
    }
    let ours = mount.join("blixard");
    fs::create_dir_all(&ours).map_err(|e| format!("cannot make {}: {e}", ours.display()))?;
    enable(mount, &there).or_else(|error| {
        // In a container the root of the hierarchy is an ordinary cgroup: it must have no process of its own.
        if error.raw_os_error() != Some(nix::libc::EBUSY) {
            return Err(format!("cannot enable controllers in {}: {error}", mount.display()));
        }
        move_away(mount).and_then(|()| enable(mount, &there)).map_err(|e| {
            format!("cannot enable controllers in {}: {e}; are there processes in it?", mount.display())
        })
    })?;
    Ok(ours)
}

fn enable(cgroup: &Path, there: &[&str]) -> io::Result<()> {
    let file = cgroup.join("cgroup.subtree_control");
    let needed: Vec<String> = NEEDED.iter().map(|c| format!("+{c}")).collect();
    fs::write(&file, needed.join(" "))?;
    for controller in WELCOME.iter().filter(|c| there.contains(c)) {
        // VMs run without it as well.
        let _ = fs::write(&file, format!("+{controller}"));
    }
    Ok(())
}

/// Moves the processes of `cgroup` into a leaf below it.
fn move_away(cgroup: &Path) -> io::Result<()> {
    let leaf = cgroup.join("blixard-dev");
    fs::create_dir_all(&leaf)?;
    for pid in fs::read_to_string(cgroup.join("cgroup.procs"))?.lines() {
        // A process may end in between.
        let _ = fs::write(leaf.join("cgroup.procs"), pid);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_without_cgroup_v2_or_a_controller_is_told_what_is_missing() {
        let mount = tempfile::tempdir().unwrap();
        assert!(make(mount.path()).unwrap_err().contains("no cgroup v2"));
        fs::write(mount.path().join("cgroup.controllers"), "cpu pids io\n").unwrap();
        assert!(make(mount.path()).unwrap_err().contains("memory"));
    }

    #[test]
    fn controllers_are_enabled_above_the_cgroup_of_the_agent() {
        let mount = tempfile::tempdir().unwrap();
        fs::write(mount.path().join("cgroup.controllers"), "cpu memory pids\n").unwrap();
        let ours = make(mount.path()).unwrap();
        assert!(ours.is_dir());
        let enabled = fs::read_to_string(mount.path().join("cgroup.subtree_control")).unwrap();
        assert_eq!(enabled, "+cpu +memory +pids");
    }
}
