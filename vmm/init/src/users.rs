//! Users and groups of the image, by name or number, as an OCI image names them
//! (OCI image specification, config.md, property `User`; formats: passwd(5), group(5)).

use std::io::Read;
use std::path::Path;

/// Most bytes read of `/etc/passwd` or `/etc/group`.
const FILE_MAX: u64 = 1 << 20;
/// Most supplementary groups a process can have (`NGROUPS_MAX` of limits.h).
const GROUPS_MAX: usize = 65536;

/// Who a program runs as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Supplementary groups, the group itself among them.
    pub groups: Vec<u32>,
    /// Home directory.
    pub home: String,
}

/// A user or group that cannot be found.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UserError {
    /// The name is not in the image's `/etc/passwd`.
    #[error("user {0:?} is not in /etc/passwd of the image")]
    NoUser(String),
    /// The name is not in the image's `/etc/group`.
    #[error("group {0:?} is not in /etc/group of the image")]
    NoGroup(String),
}

/// Looks up `user[:group]` in the files below `root`. A file that is missing is an empty one.
///
/// # Errors
/// A name that the files do not have.
pub fn look_up(root: &Path, spec: &str) -> Result<Identity, UserError> {
    identity(spec, &read(&root.join("etc/passwd")), &read(&root.join("etc/group")))
}

fn read(path: &Path) -> String {
    let mut bytes = vec![];
    if let Ok(file) = std::fs::File::open(path) {
        // What could be read before an error is as good as what there is.
        let _partly = file.take(FILE_MAX).read_to_end(&mut bytes);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Numbers that the kernel accepts as an id: -1 means "unchanged" to setuid(2) and its relatives.
fn number(text: &str) -> Option<u32> {
    text.parse().ok().filter(|n| *n != u32::MAX)
}

fn identity(spec: &str, passwd: &str, group: &str) -> Result<Identity, UserError> {
    let (user, wanted_group) = match spec.split_once(':') {
        Some((user, group)) => (user, Some(group).filter(|g| !g.is_empty())),
        None => (spec, None),
    };
    let user = if user.is_empty() { "0" } else { user };
    let entry = passwd_entries(passwd)
        .find(|e| e.name == user)
        .or_else(|| number(user).and_then(|uid| passwd_entries(passwd).find(|e| e.uid == uid)));
    let uid = match &entry {
        Some(entry) => entry.uid,
        None => number(user).ok_or_else(|| UserError::NoUser(user.into()))?,
    };
    let own_group = entry.as_ref().map_or(0, |e| e.gid);
    let mut groups = vec![];
    let gid = match wanted_group {
        Some(name) => {
            let found = group_entries(group).find(|g| g.name == name).map(|g| g.gid);
            found.or_else(|| number(name)).ok_or_else(|| UserError::NoGroup(name.into()))?
        }
        None => {
            let name = entry.as_ref().map_or("", |e| e.name);
            groups.extend(group_entries(group).filter(|g| g.has(name)).map(|g| g.gid));
            own_group
        }
    };
    groups.push(gid);
    groups.sort_unstable();
    groups.dedup();
    groups.truncate(GROUPS_MAX);
    let home = entry.map(|e| e.home).filter(|h| h.starts_with('/')).unwrap_or("/").to_owned();
    Ok(Identity { uid, gid, groups, home })
}

struct PasswdEntry<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

fn passwd_entries(text: &str) -> impl Iterator<Item = PasswdEntry<'_>> {
    text.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let (name, _password) = (fields.next()?, fields.next()?);
        let (uid, gid) = (number(fields.next()?)?, number(fields.next()?)?);
        let (_comment, home) = (fields.next()?, fields.next()?);
        Some(PasswdEntry { name, uid, gid, home })
    })
}

struct GroupEntry<'a> {
    name: &'a str,
    gid: u32,
    members: &'a str,
}

impl GroupEntry<'_> {
    fn has(&self, user: &str) -> bool {
        !user.is_empty() && self.members.split(',').any(|member| member == user)
    }
}

fn group_entries(text: &str) -> impl Iterator<Item = GroupEntry<'_>> {
    text.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let (name, _password) = (fields.next()?, fields.next()?);
        let gid = number(fields.next()?)?;
        Some(GroupEntry { name, gid, members: fields.next().unwrap_or("") })
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nbroken line\nweb:x:33:34:,,,:/var/www:/bin/false\n\
        1000:x:2000:2000::/odd:/bin/sh\n";
    const GROUP: &str = "root:x:0:\nweb:x:34:\nvideo:x:44:other,web\naudio:x:29:webb\n";

    fn ids(spec: &str) -> (u32, u32, Vec<u32>, String) {
        let i = identity(spec, PASSWD, GROUP).unwrap();
        (i.uid, i.gid, i.groups, i.home)
    }

    #[test]
    fn nothing_means_root() {
        assert_eq!(ids(""), (0, 0, vec![0], "/root".into()));
    }

    #[test]
    fn a_name_brings_its_group_its_memberships_and_its_home() {
        assert_eq!(ids("web"), (33, 34, vec![34, 44], "/var/www".into()));
    }

    #[test]
    fn a_number_with_an_entry_is_as_good_as_its_name() {
        assert_eq!(ids("33"), ids("web"));
    }

    #[test]
    fn a_number_without_an_entry_runs_in_group_0() {
        assert_eq!(ids("4242"), (4242, 0, vec![0], "/".into()));
    }

    #[test]
    fn an_explicit_group_replaces_all_others() {
        assert_eq!(ids("web:video"), (33, 44, vec![44], "/var/www".into()));
        assert_eq!(ids("7:9"), (7, 9, vec![9], "/".into()));
    }

    #[test]
    fn a_name_that_looks_like_a_number_is_a_name_first() {
        assert_eq!(ids("1000").0, 2000);
    }

    #[test]
    fn unknown_names_and_the_number_minus_one_are_refused() {
        assert_eq!(identity("nobody", PASSWD, GROUP), Err(UserError::NoUser("nobody".into())));
        assert_eq!(identity("web:nobody", PASSWD, GROUP), Err(UserError::NoGroup("nobody".into())));
        assert!(identity("4294967295", PASSWD, GROUP).is_err());
    }

    proptest! {
        #[test]
        fn arbitrary_files_never_panic(spec in ".{0,20}", passwd in ".{0,200}", group in "[a-z:0-9,\n]{0,200}") {
            let _any = identity(&spec, &passwd, &group);
        }
    }
}
