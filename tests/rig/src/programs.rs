//! The programs of this machine that the rig needs, and which packages have them.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Program and its Debian/Ubuntu package.
const NEEDED: [(&str, &str); 5] = [
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("mmdebstrap", "mmdebstrap"),
    // mmdebstrap finds the key of the archive with it.
    ("gpg", "gpg"),
    ("mkfs.ext4", "e2fsprogs"),
    ("ssh", "openssh-client"),
];
/// For building images without being root.
const NEEDED_BY_USERS: (&str, &str) = ("newuidmap", "uidmap");
/// Debian's archive key; Ubuntu has it in a package of its own.
const KEYRING: (&str, &str) = ("/usr/share/keyrings/debian-archive-keyring.gpg", "debian-archive-keyring");

/// What is missing here.
#[derive(Debug, thiserror::Error)]
#[error("missing: {}; install with: {}", .0.iter().map(|(what, _)| *what).collect::<Vec<_>>().join(", "), install(.0))]
pub struct Missing(Vec<(&'static str, &'static str)>);

fn install(missing: &[(&'static str, &'static str)]) -> String {
    let packages: Vec<_> = missing.iter().map(|(_, package)| *package).collect();
    let sudo = if nix::unistd::geteuid().is_root() { "" } else { "sudo " };
    format!("{sudo}apt-get install --no-install-recommends {}", packages.join(" "))
}

/// Whether everything for running hosts and building images is there.
pub fn check() -> Result<(), Missing> {
    let mut missing: Vec<_> = NEEDED.into_iter().filter(|(program, _)| find(program).is_none()).collect();
    if !nix::unistd::geteuid().is_root() && find(NEEDED_BY_USERS.0).is_none() {
        missing.push(NEEDED_BY_USERS);
    }
    if !Path::new(KEYRING.0).exists() {
        missing.push(KEYRING);
    }
    if missing.is_empty() { Ok(()) } else { Err(Missing(missing)) }
}

/// Full path of a program.
pub fn find(program: &str) -> Option<PathBuf> {
    env::split_paths(&path()).map(|folder| folder.join(program)).find(|file| file.is_file())
}

/// A command with the search path of [`path`].
pub fn command(program: &str) -> Command {
    let mut command = Command::new(find(program).unwrap_or_else(|| program.into()));
    command.env("PATH", path());
    command
}

/// `PATH` with the folders of system programs, which users often do not have in theirs.
fn path() -> OsString {
    let mut path = env::var_os("PATH").unwrap_or_default();
    path.push(if path.is_empty() { "" } else { ":" });
    path.push("/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin");
    path
}

/// First line of `qemu-system-x86_64 --version`, empty when it cannot be run.
pub fn qemu_version() -> String {
    let output = command("qemu-system-x86_64").arg("--version").output();
    let text = output.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
    text.lines().next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_message_names_program_package_and_command() {
        let text = Missing(vec![NEEDED[1], NEEDED[3]]).to_string();
        assert!(text.contains("missing: mmdebstrap, mkfs.ext4"));
        assert!(text.ends_with("apt-get install --no-install-recommends mmdebstrap e2fsprogs"));
    }

    #[test]
    fn system_folders_are_searched_too() {
        assert!(find("sh").is_some());
        assert!(find("no-such-program-anywhere").is_none());
    }
}
