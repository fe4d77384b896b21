//! The folders and users of `dev`.
//!
//! A process that gave up its privileges must be able to make its socket, and the right other process must be able to use
//! it. Sockets of netd and node are in folders of their own, which belong to the process; the folder's set-group-id bit
//! gives the socket the group of who may connect. Nothing is changed later behind the back of a process.

use std::fs::{self, File, Permissions, TryLockError};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};

use nix::unistd::{Uid, User};

use crate::error::{CliError, code};

/// First user id that is tried when the users of an installed Blixard are not there.
const FREE_UID: u32 = 65_001;

/// A user and the group of the same number or of the same name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Account {
    pub uid: u32,
    pub gid: u32,
}

/// The folders, made; nobody else uses them while this lives.
pub struct Folders {
    pub run: PathBuf,
    state: PathBuf,
    pub node_user: Account,
    pub netd_user: Account,
    _lock: File,
}

impl Folders {
    /// Makes the folders of state and sockets.
    pub fn make(state: &Path, run: &Path) -> Result<Self, CliError> {
        let absolute = |path: &Path| {
            std::path::absolute(path)
                .map_err(|e| CliError::local(format!("cannot use {}", path.display()), e))
        };
        let (state, run) = (absolute(state)?, absolute(run)?);
        folder(&state, None, 0o755)?;
        let lock = lock(&state)?;
        folder(&run, None, 0o755)?;
        // What the node wrote stays readable for it: an earlier user of its state is kept.
        let earlier = fs::metadata(state.join("node")).ok().filter(|m| m.uid() != 0);
        let earlier = earlier.map(|m| Account { uid: m.uid(), gid: m.gid() });
        let node_user = earlier.unwrap_or_else(|| account("blixard", FREE_UID));
        let netd_user =
            account("blixard-net", if node_user.uid == FREE_UID { FREE_UID + 1 } else { FREE_UID });
        let folders = Self { run, state, node_user, netd_user, _lock: lock };
        folder(&folders.agent_state(), None, 0o700)?;
        folder(&folders.node_state(), Some(node_user), 0o700)?;
        // The agent is root without the right to pass over modes: it connects as group root.
        folder(&folders.run.join("netd"), Some(Account { gid: 0, ..netd_user }), 0o2755)?;
        let caller = std::env::var("SUDO_GID").ok().and_then(|g| g.parse().ok()).unwrap_or(0);
        folder(&folders.run.join("node"), Some(Account { gid: caller, ..node_user }), 0o2755)?;
        folders.link()?;
        Ok(folders)
    }

    /// The socket of users is where they look for it.
    fn link(&self) -> Result<(), CliError> {
        let public = self.public_socket();
        let cannot = |e| CliError::local(format!("cannot make {}", public.display()), e);
        match fs::remove_file(&public) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(cannot(error)),
            _ => symlink("node/node.sock", &public).map_err(cannot),
        }
    }

    pub fn agent_state(&self) -> PathBuf {
        self.state.join("agent")
    }

    pub fn node_state(&self) -> PathBuf {
        self.state.join("node")
    }

    pub fn netd_socket(&self) -> PathBuf {
        self.run.join("netd/netd.sock")
    }

    pub fn agent_socket(&self) -> PathBuf {
        self.run.join("agent.sock")
    }

    pub fn node_socket(&self) -> PathBuf {
        self.run.join("node/node.sock")
    }

    /// What users connect to.
    pub fn public_socket(&self) -> PathBuf {
        self.run.join("node.sock")
    }
}

/// The user of this name, or the first free number from `first` on.
fn account(name: &str, first: u32) -> Account {
    if let Ok(Some(user)) = User::from_name(name) {
        return Account { uid: user.uid.as_raw(), gid: user.gid.as_raw() };
    }
    let free = (first..first + 500).find(|uid| matches!(User::from_uid(Uid::from_raw(*uid)), Ok(None)));
    let uid = free.unwrap_or(first);
    Account { uid, gid: uid }
}

/// Makes a folder, or gives the one that is there this owner and mode.
fn folder(path: &Path, owner: Option<Account>, mode: u32) -> Result<(), CliError> {
    let cannot = |e| CliError::local(format!("cannot make the folder {}", path.display()), e);
    fs::create_dir_all(path).map_err(cannot)?;
    let owner = owner.unwrap_or(Account { uid: 0, gid: 0 });
    let meta = fs::symlink_metadata(path).map_err(cannot)?;
    if (meta.uid(), meta.gid()) != (owner.uid, owner.gid) {
        chown(path, Some(owner.uid), Some(owner.gid)).map_err(cannot)?;
    }
    // After chown, which takes away the set-group-id bit.
    fs::set_permissions(path, Permissions::from_mode(mode)).map_err(cannot)
}

fn lock(state: &Path) -> Result<File, CliError> {
    let path = state.join("dev.lock");
    let cannot = |e| CliError::local(format!("cannot use {}", path.display()), e);
    let file = File::create(&path).map_err(cannot)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::Error(error)) => Err(cannot(error)),
        Err(TryLockError::WouldBlock) => Err(CliError::Vm {
            message: format!("another `blixard dev` uses {}", state.display()),
            suggestion: "stop that one, or give this one its own --state and --run".into(),
            code: code::CONFLICT,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_devs_on_one_state_are_a_conflict() {
        let folder = tempfile::tempdir().unwrap();
        let first = lock(folder.path()).unwrap();
        let error = lock(folder.path()).unwrap_err();
        assert_eq!(error.code(), 4, "{}", error.to_text());
        drop(first);
        assert!(lock(folder.path()).is_ok());
    }

    #[test]
    fn folders_have_the_owners_that_let_each_process_make_its_socket_and_the_right_one_use_it() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let base = tempfile::tempdir().unwrap();
        let made = Folders::make(&base.path().join("state"), &base.path().join("run")).unwrap();
        let of = |path: PathBuf| {
            let meta = fs::metadata(path).unwrap();
            (meta.uid(), meta.gid(), meta.mode() & 0o7777)
        };
        let (node, netd) = (made.node_user, made.netd_user);
        assert!(node.uid != 0 && netd.uid != 0 && node.uid != netd.uid);
        assert_eq!(of(made.node_state()), (node.uid, node.gid, 0o700));
        assert_eq!(of(made.agent_state()), (0, 0, 0o700));
        assert_eq!(of(made.run.join("netd")), (netd.uid, 0, 0o2755));
        assert_eq!(of(made.run.join("node")).2, 0o2755);
        assert_eq!(fs::read_link(made.public_socket()).unwrap(), Path::new("node/node.sock"));
        drop(made);
        let again = Folders::make(&base.path().join("state"), &base.path().join("run")).unwrap();
        assert_eq!(again.node_user, node, "state keeps its user");
    }
}
