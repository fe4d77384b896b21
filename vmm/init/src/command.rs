//! From a command as the host gives it to a process that can be started: user, environment, directory, program.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process;

use blixard_vmm_api::guest::{Command, WorkloadExit};
use nix::unistd::{Gid, Uid};

use crate::sys;
use crate::users::{self, Identity};

/// Where programs are searched when the environment does not say it: what container engines use.
const PATH_DEFAULT: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// A program exists and cannot be executed (POSIX, Shell Command Language, section 2.8.2).
const NOT_EXECUTABLE: u8 = 126;
/// A program does not exist (the same section).
const NOT_FOUND: u8 = 127;

/// Why a command was not started.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct NotStarted {
    /// As a shell says it: 126 or 127.
    pub code: u8,
    /// For the user.
    pub reason: String,
}

impl NotStarted {
    fn found(reason: String) -> Self {
        Self { code: NOT_EXECUTABLE, reason }
    }

    fn missing(reason: String) -> Self {
        Self { code: NOT_FOUND, reason }
    }

    /// For an error of the attempt to execute `program`.
    pub fn from_spawn(program: &str, error: &io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::ENOENT) => Self::missing(format!("{program}: its interpreter does not exist")),
            Some(libc::ENOEXEC) => Self::found(format!("{program}: not a program of this machine")),
            _ => Self::found(format!("{program}: {error}")),
        }
    }

    /// As the end of a workload.
    pub fn exit(&self) -> WorkloadExit {
        WorkloadExit::NotStarted(self.code)
    }
}

/// What differs between a workload and an exec command.
#[derive(Debug, Clone, Copy)]
pub struct Surroundings {
    /// Default of `TERM`, if the command has a terminal as standard input.
    pub terminal: Option<&'static str>,
    /// Make the working directory if it does not exist.
    pub make_directory: bool,
}

/// Prepares `wanted`; the caller still has to say what standard input, output and error are.
///
/// # Errors
/// User, directory or program do not exist or cannot be used.
pub fn prepare(
    wanted: &Command,
    surroundings: Surroundings,
) -> Result<(process::Command, Identity), NotStarted> {
    let identity =
        users::look_up(Path::new("/"), &wanted.user).map_err(|error| NotStarted::found(error.to_string()))?;
    let env = environment(wanted, &identity, surroundings.terminal);
    let cwd = if wanted.cwd.is_empty() { Path::new("/") } else { Path::new(&wanted.cwd) };
    if surroundings.make_directory
        && let Err(error) = std::fs::create_dir_all(cwd)
    {
        return Err(NotStarted::found(format!("working directory {}: {error}", cwd.display())));
    }
    if !cwd.is_absolute() || !cwd.is_dir() {
        return Err(NotStarted::found(format!("working directory {} does not exist", cwd.display())));
    }
    let [name, arguments @ ..] = wanted.args.as_slice() else {
        return Err(NotStarted::missing("no program was given".into()));
    };
    let path = env.get("PATH").map_or(PATH_DEFAULT, String::as_str);
    let mut command = process::Command::new(find(name, path, cwd)?);
    command.arg0(name).args(arguments).current_dir(cwd).env_clear().envs(&env);
    let groups = identity.groups.iter().map(|gid| Gid::from_raw(*gid)).collect();
    let (uid, gid) = (Uid::from_raw(identity.uid), Gid::from_raw(identity.gid));
    sys::begin_session_as(&mut command, surroundings.terminal.is_some(), uid, gid, groups);
    Ok((command, identity))
}

fn environment(wanted: &Command, identity: &Identity, terminal: Option<&str>) -> BTreeMap<String, String> {
    let mut env = wanted.env.clone();
    let mut default = |name: &str, value: &str| {
        env.entry(name.into()).or_insert_with(|| value.into());
    };
    default("PATH", PATH_DEFAULT);
    default("HOME", &identity.home);
    if let Some(terminal) = terminal {
        default("TERM", terminal);
    }
    env
}

/// The file to execute for `name`: as it is with a `/` in it, else the first executable one in `path`.
fn find(name: &str, path: &str, cwd: &Path) -> Result<PathBuf, NotStarted> {
    let mut candidates = path.split(':').map(|directory| cwd.join(directory).join(name));
    let alone = name.contains('/');
    let tried: Vec<(PathBuf, Use)> = if alone {
        vec![(name.into(), look(&cwd.join(name)))]
    } else {
        candidates.by_ref().map(|file| (file.clone(), look(&file))).collect()
    };
    let first = |wanted| tried.iter().find(|(_, use_)| *use_ == wanted).map(|(file, _)| file);
    if let Some(file) = first(Use::Executable) {
        return Ok(file.clone());
    }
    match first(Use::NotExecutable) {
        Some(file) => Err(NotStarted::found(format!("{}: not executable", file.display()))),
        None if alone => Err(NotStarted::missing(format!("{name}: no such file"))),
        None => Err(NotStarted::missing(format!("{name}: not found in PATH"))),
    }
}

#[derive(PartialEq, Eq)]
enum Use {
    Executable,
    NotExecutable,
    Missing,
}

fn look(file: &Path) -> Use {
    match std::fs::metadata(file) {
        Ok(found) if found.is_file() && found.permissions().mode() & 0o111 != 0 => Use::Executable,
        Ok(_) => Use::NotExecutable,
        Err(_) => Use::Missing,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Surroundings = Surroundings { terminal: None, make_directory: false };

    fn command(args: &[&str]) -> Command {
        Command { args: args.iter().map(|a| (*a).into()).collect(), ..Command::default() }
    }

    fn refused(wanted: &Command) -> NotStarted {
        prepare(wanted, PLAIN).map(|_| ()).unwrap_err()
    }

    #[test]
    fn what_is_not_there_is_127_and_what_cannot_be_executed_126() {
        assert_eq!(refused(&command(&["no-such-program-here"])).code, 127);
        assert_eq!(refused(&command(&["/no/such/program"])).code, 127);
        assert_eq!(refused(&command(&["/etc/passwd"])).code, 126);
        assert_eq!(refused(&command(&["/etc"])).code, 126);
        assert_eq!(refused(&command(&[])).code, 127);
    }

    #[test]
    fn the_first_executable_file_in_the_path_wins() {
        let directory = tempfile::tempdir().unwrap();
        let make = |name: &str, mode| {
            let file = directory.path().join(name).join("tool");
            std::fs::create_dir(file.parent().unwrap()).unwrap();
            std::fs::write(&file, "#!/bin/sh\n").unwrap();
            std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode)).unwrap();
        };
        make("a", 0o644);
        make("b", 0o755);
        make("c", 0o755);
        let found = find("tool", "missing:a:b:c", directory.path()).unwrap();
        assert_eq!(found, directory.path().join("b/tool"));
        assert_eq!(find("tool", "missing:a", directory.path()).unwrap_err().code, 126);
    }

    #[test]
    fn a_user_or_directory_that_does_not_exist_is_named() {
        let mut wanted = command(&["/bin/sh"]);
        wanted.user = "no-such-user".into();
        assert!(refused(&wanted).reason.contains("no-such-user"));
        wanted.user.clear();
        wanted.cwd = "/no/such/directory".into();
        assert!(refused(&wanted).reason.contains("/no/such/directory"));
        wanted.cwd = "relative".into();
        assert_eq!(refused(&wanted).code, 126);
    }

    #[test]
    fn given_variables_win_over_defaults() {
        let mut wanted = command(&["/bin/sh"]);
        wanted.env.insert("HOME".into(), "/elsewhere".into());
        let identity = Identity { uid: 0, gid: 0, groups: vec![0], home: "/root".into() };
        let env = environment(&wanted, &identity, Some("linux"));
        assert_eq!(env["HOME"], "/elsewhere");
        assert_eq!(env["TERM"], "linux");
        assert_eq!(env["PATH"], PATH_DEFAULT);
    }
}
