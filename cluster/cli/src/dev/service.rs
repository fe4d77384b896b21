//! One process of `dev`: started as its user, its lines shown with its name, started again when it ends.

use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::folders::Account;
use crate::output::{Output, printable};

/// Time that a process has to end by itself.
pub const END_TIME: Duration = Duration::from_secs(10);
/// First and longest pause before a process is started again.
const PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(10));
/// A process that ran this long was in order: the next pause is the first one again.
const HEALTHY: Duration = Duration::from_secs(30);
/// Longest line that is shown in bytes.
const LINE_BYTES_MAX: usize = 4096;

/// As whom a process runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Identity {
    /// root; it gives up what it does not need itself.
    Root,
    /// A user with the capability to change the network.
    NetAdmin(Account),
    /// A user without any capability.
    Nothing(Account),
}

impl Identity {
    /// Arguments of `setpriv` (util-linux) before the program.
    fn arguments(self) -> Vec<String> {
        let mut words: Vec<String> = vec!["--pdeathsig".into(), "TERM".into()];
        let (account, capabilities) = match self {
            Self::Root => return words,
            Self::NetAdmin(account) => (account, "-all,+net_admin"),
            Self::Nothing(account) => (account, "-all"),
        };
        words.extend([
            format!("--reuid={}", account.uid),
            format!("--regid={}", account.gid),
            "--clear-groups".into(),
            format!("--inh-caps={capabilities}"),
            format!("--ambient-caps={capabilities}"),
            format!("--bounding-set={capabilities}"),
            "--no-new-privs".into(),
        ]);
        words
    }
}

/// A process that is kept running.
pub struct Service {
    end: watch::Sender<bool>,
    failures: watch::Receiver<Option<String>>,
    task: JoinHandle<()>,
}

/// Tells of the first end of a process.
pub struct FirstFailure(watch::Receiver<Option<String>>);

impl FirstFailure {
    /// How it ended.
    pub async fn next(&mut self) -> String {
        match self.0.wait_for(Option::is_some).await {
            Ok(why) => why.clone().unwrap_or_default(),
            Err(_) => std::future::pending().await,
        }
    }
}

impl Service {
    /// Starts the process and keeps it running.
    pub fn start(
        output: Output,
        name: &'static str,
        setpriv: &Path,
        identity: Identity,
        program: &Path,
        arguments: Vec<PathBuf>,
    ) -> Self {
        let mut command = Command::new(setpriv);
        command
            .args(identity.arguments())
            .arg("--")
            .arg(program)
            .args(arguments)
            .env("NO_COLOR", "1")
            // As the node's unit has it; the others have another allocator.
            .env("MIMALLOC_PURGE_DELAY", "100")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // Ctrl-C is for `dev` alone, which ends its processes in order.
            .process_group(0)
            .kill_on_drop(true);
        let (end, ends) = watch::channel(false);
        let (failed, failures) = watch::channel(None);
        let task = tokio::spawn(keep(output, name, command, ends, failed));
        Self { end, failures, task }
    }

    /// Tells of the first end of the process.
    pub fn first_failure(&self) -> FirstFailure {
        FirstFailure(self.failures.clone())
    }

    /// Ends the process: SIGTERM, after a time SIGKILL.
    pub async fn stop(self) {
        // Fails when the task has already ended.
        let _ = self.end.send(true);
        let _ = self.task.await;
    }
}

/// Starts the process again and again until it shall end.
async fn keep(
    output: Output,
    name: &'static str,
    mut command: Command,
    mut ends: watch::Receiver<bool>,
    failed: watch::Sender<Option<String>>,
) {
    let mut pause = PAUSE.0;
    loop {
        let begin = Instant::now();
        let why = match command.spawn() {
            Ok(mut child) => {
                show(output, name, child.stdout.take());
                show(output, name, child.stderr.take());
                tokio::select! {
                    status = child.wait() => match status {
                        Ok(status) => status.to_string(),
                        Err(error) => error.to_string(),
                    },
                    () = asked(&mut ends) => return end(&mut child).await,
                }
            }
            Err(error) => error.to_string(),
        };
        pause = if begin.elapsed() > HEALTHY { PAUSE.0 } else { pause };
        output.note(&format!(
            "dev   | blixard-{name} ended ({why}); started again in {}",
            crate::units::show_short(pause)
        ));
        failed.send_replace(Some(why));
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = asked(&mut ends) => return,
        }
        pause = (pause * 2).min(PAUSE.1);
    }
}

/// Waits until the process shall end.
async fn asked(ends: &mut watch::Receiver<bool>) {
    // The other side has gone: then it shall end as well.
    let _ = ends.wait_for(|end| *end).await;
}

async fn end(child: &mut Child) {
    terminate(child);
    if tokio::time::timeout(END_TIME, child.wait()).await.is_err() {
        // It has ended when this fails.
        let _ = child.kill().await;
    }
}

/// Asks a process to end.
pub fn terminate(child: &Child) {
    if let Some(pid) = child.id().and_then(|id| i32::try_from(id).ok()) {
        // It has ended when this fails.
        let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
    }
}

/// Shows each line with the name of its process in front.
fn show(output: Output, name: &'static str, stream: Option<impl AsyncRead + Unpin + Send + 'static>) {
    let Some(stream) = stream else { return };
    tokio::spawn(async move {
        let mut reader = BufReader::with_capacity(LINE_BYTES_MAX, stream);
        let mut line = Vec::new();
        loop {
            let Ok(bytes) = reader.fill_buf().await else { return };
            if bytes.is_empty() {
                return;
            }
            let (taken, ended) = match bytes.iter().position(|b| *b == b'\n') {
                Some(at) => (at + 1, true),
                None => (bytes.len(), false),
            };
            line.extend_from_slice(bytes.get(..taken).unwrap_or_default());
            reader.consume(taken);
            if ended || line.len() >= LINE_BYTES_MAX {
                let text = String::from_utf8_lossy(&line);
                output.note(&format!("{name:<5} | {}", printable(text.trim_end())));
                line.clear();
            }
        }
    });
}

/// The exit code of a process as a shell says it.
pub fn exit_code(status: ExitStatus) -> u8 {
    use std::os::unix::process::ExitStatusExt;
    let code = status.code().or_else(|| status.signal().map(|s| s.saturating_add(128))).unwrap_or(1);
    u8::try_from(code).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Format;

    const QUIET: Output = Output { format: Format::Table, quiet: true };

    fn shell(script: String) -> Service {
        let arguments = vec!["-c".into(), script.into()];
        Service::start(QUIET, "test", Path::new("setpriv"), Identity::Root, Path::new("/bin/sh"), arguments)
    }

    #[tokio::test]
    async fn a_process_that_ends_is_told_of_and_started_again() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("starts");
        let service = shell(format!("echo x >> {}; exit 3", file.display()));
        let why = service.first_failure().next().await;
        assert!(why.contains('3'), "{why}");
        let starts = || std::fs::read_to_string(&file).unwrap_or_default().lines().count();
        while starts() < 3 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        service.stop().await;
        let after = starts();
        tokio::time::sleep(PAUSE.0 * 3).await;
        assert_eq!(starts(), after, "nothing is started after stop");
    }

    #[tokio::test]
    async fn stop_lets_a_process_end_in_good_order() {
        let folder = tempfile::tempdir().unwrap();
        let (up, down) = (folder.path().join("up"), folder.path().join("down"));
        let service = shell(format!(
            "trap 'touch {}; exit 0' TERM; touch {}; while :; do sleep 0.01; done",
            down.display(),
            up.display()
        ));
        while !up.exists() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        service.stop().await;
        assert!(down.exists());
    }

    #[test]
    fn a_user_without_capabilities_loses_all_sets() {
        let words = Identity::Nothing(Account { uid: 7, gid: 8 }).arguments().join(" ");
        for part in [
            "--reuid=7",
            "--regid=8",
            "--clear-groups",
            "--inh-caps=-all",
            "--ambient-caps=-all",
            "--bounding-set=-all",
        ] {
            assert!(words.contains(part), "{part}: {words}");
        }
    }
}
