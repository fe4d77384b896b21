//! `dev`: a one-node cluster in the foreground.
//!
//! Starts netd (CAP_NET_ADMIN only), agent (root) and node (nothing) as their own users, starts each again when it ends,
//! and at the end stops the VMs and then the three in the opposite order. Everything it makes is below two folders and
//! one cgroup.

mod cgroup;
mod folders;
mod service;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use blixard_api::Client;
use blixard_api::client::{ClientError, Host};
use blixard_api::vm::{Phase, StopVm};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::args::{Dev, Format};
use crate::error::{CliError, code};
use crate::follow::Subject;
use crate::output::Output;
use crate::{kernel, programs};
use folders::Folders;
use service::{Identity, Service};

/// Longest time for one process to listen, and for the node to serve.
const READY_TIME: Duration = Duration::from_secs(60);
/// Longest time for VMs to stop at the end.
const STOP_TIME: Duration = Duration::from_secs(30);
/// First and longest pause between looks at what is waited for.
const LOOK_MS: (u64, u64) = (2, 100);

/// `dev`.
pub async fn dev(output: Output, options: Dev) -> Result<u8, CliError> {
    if !nix::unistd::geteuid().is_root() {
        return Err(CliError::Vm {
            message:
                "blixard dev needs root: it starts the agent, which makes users, cgroups and jails for VMs"
                    .into(),
            suggestion: "sudo blixard dev (the CLI itself works without root afterwards)".into(),
            code: code::DENIED,
        });
    }
    let mut signals = Signals::new()?;
    let folders = Folders::make(&options.state, &options.run)?;
    let mut services = Services { output, started: vec![] };
    let result = tokio::select! {
        result = services.start(&options, &folders) => result.map(Some),
        () = signals.next() => Ok(None),
    };
    let result = match result {
        Ok(Some(client)) => serve(output, &options, &client, &mut signals).await,
        Ok(None) => Ok(code::INTERRUPTED),
        Err(error) => Err(error),
    };
    services.stop().await;
    result
}

/// From ready to the end; answers the exit code.
async fn serve(
    output: Output,
    options: &Dev,
    client: &Client,
    signals: &mut Signals,
) -> Result<u8, CliError> {
    let host = client.host().to_string();
    let import = async {
        if options.no_kernel {
            return;
        }
        if let Err(error) = default_kernel(output, client).await {
            output
                .note(&format!("dev   | no default kernel: {}", error.to_text().replace('\n', "\ndev   | ")));
        }
    };
    tokio::select! {
        () = import => {}
        () = signals.next() => return Ok(0),
    }
    let result = if options.command.is_empty() {
        announce(output, &host)?;
        signals.next().await;
        Ok(0)
    } else {
        command(&options.command, &host, signals).await
    };
    if !options.keep {
        let stopped = tokio::time::timeout(STOP_TIME, stop_vms(output, client));
        if stopped.await.is_err() {
            output.note(&format!("dev   | VMs did not stop within {} s", STOP_TIME.as_secs()));
        }
    }
    result
}

fn announce(output: Output, host: &str) -> Result<(), CliError> {
    if output.format == Format::Json {
        return output.event(&serde_json::json!({ "ready": true, "host": host }));
    }
    let flag = if host == blixard_api::client::DEFAULT_HOST {
        String::new()
    } else {
        format!("export BLIXARD_HOST={host}\n  ")
    };
    output.text(&format!(
        "blixard is ready. In another terminal:\n  {flag}blixard image import FILE.tar --name NAME\n  \
         blixard run -d --name first NAME\n  blixard exec -it first sh\n  blixard ps\nCtrl-C stops it.\n"
    ))
}

/// Runs the user's command and answers its exit code.
async fn command(words: &[String], host: &str, signals: &mut Signals) -> Result<u8, CliError> {
    let (Some(program), arguments) = (words.first(), words.get(1..).unwrap_or_default()) else {
        return Ok(0);
    };
    let own = std::env::current_exe().unwrap_or_default();
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = own.parent().map(Path::to_owned).into_iter().chain(std::env::split_paths(&path));
    let mut child = tokio::process::Command::new(program)
        .args(arguments)
        .env("BLIXARD_HOST", host)
        .env("PATH", std::env::join_paths(folders).unwrap_or(path.clone()))
        .kill_on_drop(true)
        .spawn()
        .map_err(|e| CliError::local(format!("cannot run {program}"), e))?;
    let ended = |status: std::io::Result<std::process::ExitStatus>| {
        let status = status.map_err(|e| CliError::local(format!("cannot wait for {program}"), e))?;
        Ok(service::exit_code(status))
    };
    tokio::select! {
        status = child.wait() => return ended(status),
        () = signals.next() => {}
    }
    // Ctrl-C reached the command as well; SIGTERM did not.
    service::terminate(&child);
    match tokio::time::timeout(service::END_TIME, child.wait()).await {
        Ok(status) => ended(status),
        Err(_) => Ok(code::INTERRUPTED),
    }
}

/// Imports this host's kernel when there is no default one.
async fn default_kernel(output: Output, client: &Client) -> Result<(), CliError> {
    match client.kernel(kernel::DEFAULT).await {
        Ok(_) => return Ok(()),
        Err(error) if error.status() == Some(404) => {}
        Err(error) => return Err(error.into()),
    }
    let begin = Instant::now();
    let view = kernel::import(client, output, kernel::DEFAULT, kernel::Source::Host).await?;
    let time = crate::units::show_short(begin.elapsed());
    output.note(&format!("dev   | imported this host's kernel {} as {} in {time}", view.release, view.name));
    Ok(())
}

async fn stop_vms(output: Output, client: &Client) {
    let project = blixard_api::DEFAULT_PROJECT;
    let page = match client.list_vms(project, &[]).await {
        Ok(page) => page,
        Err(error) => return output.error(&error.into()),
    };
    let running = page.items.iter().filter(|v| !matches!(v.phase, Phase::Stopped | Phase::Failed));
    let stops = running.map(|view| async move {
        let id = view.id.to_string();
        let subject = Subject { client, project, name: &id };
        output.note(&format!("dev   | stopping VM {}", view.name));
        let asked = client.stop_vm(project, &id, StopVm::default()).await.map_err(CliError::from);
        let done = match asked {
            Ok(_) => subject.wait(&["stopped", "failed"], Some(STOP_TIME)).await.map(drop),
            Err(error) => Err(error),
        };
        if let Err(error) = done {
            output.error(&error);
        }
    });
    futures::future::join_all(stops).await;
}

/// The processes, in the order they were started.
struct Services {
    output: Output,
    started: Vec<Service>,
}

impl Services {
    /// Starts all three and waits until the node serves and its agent answers.
    async fn start(&mut self, options: &Dev, folders: &Folders) -> Result<Client, CliError> {
        let program = |name: &str| programs::find(options.bin_dir.as_deref(), name);
        let (netd, agent, node) =
            (program("blixard-netd")?, program("blixard-agent")?, program("blixard-node")?);
        let (vmm, init) = (program("blixard-vmm")?, program("blixard-init")?);
        let setpriv = programs::find(None, "setpriv")?;
        let cgroup = cgroup::prepare(self.output);

        let identity = Identity::NetAdmin(folders.netd_user);
        let arguments = ["--socket".into(), folders.netd_socket(), "--agent-uid".into(), "0".into()];
        self.run("netd", &setpriv, identity, &netd, arguments.to_vec(), &folders.netd_socket()).await?;

        let mut arguments: Vec<PathBuf> = vec![
            "--state".into(),
            folders.agent_state(),
            "--run".into(),
            folders.run.clone(),
            "--node-uid".into(),
            folders.node_user.uid.to_string().into(),
            "--netd".into(),
            folders.netd_socket(),
            "--vmm".into(),
            vmm,
        ];
        match cgroup {
            Some(path) => arguments.extend(["--cgroup".into(), path]),
            None => arguments.push("--no-cgroup".into()),
        }
        self.run("agent", &setpriv, Identity::Root, &agent, arguments, &folders.agent_socket()).await?;

        let name = options.name.clone().unwrap_or_else(node_name);
        let arguments: Vec<PathBuf> = vec![
            "--state".into(),
            folders.node_state(),
            "--agent".into(),
            folders.agent_socket(),
            "--socket".into(),
            folders.node_socket(),
            "--name".into(),
            name.into(),
            "--init".into(),
            init,
        ];
        let identity = Identity::Nothing(folders.node_user);
        self.run("node", &setpriv, identity, &node, arguments, &folders.node_socket()).await?;

        let client = Client::new(Host::Unix(folders.public_socket()));
        serves(&client).await?;
        Ok(client)
    }

    async fn run(
        &mut self,
        name: &'static str,
        setpriv: &Path,
        identity: Identity,
        program: &Path,
        arguments: Vec<PathBuf>,
        socket: &Path,
    ) -> Result<(), CliError> {
        // Left over by a process that was killed: it would be taken for the new one's.
        match std::fs::remove_file(socket) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(CliError::local(format!("cannot remove {}", socket.display()), error));
            }
            _ => {}
        }
        let service = Service::start(self.output, name, setpriv, identity, program, arguments);
        let mut failed = service.first_failure();
        self.started.push(service);
        let listening = async {
            let mut pause = LOOK_MS.0;
            while !socket.exists() {
                tokio::time::sleep(Duration::from_millis(pause)).await;
                pause = (pause * 2).min(LOOK_MS.1);
            }
        };
        tokio::select! {
            () = listening => Ok(()),
            why = failed.next() => Err(CliError::Vm {
                message: format!("blixard-{name} ended before it listened: {why}"),
                suggestion: "its last lines above say why; `sudo blixard doctor` looks at this host".into(),
                code: code::ERROR,
            }),
            () = tokio::time::sleep(READY_TIME) => Err(CliError::Vm {
                message: format!("blixard-{name} did not listen at {} within {} s", socket.display(), READY_TIME.as_secs()),
                suggestion: "its last lines above may say why".into(),
                code: code::TIMEOUT,
            }),
        }
    }

    /// Stops all in the opposite order.
    async fn stop(self) {
        for service in self.started.into_iter().rev() {
            service.stop().await;
        }
    }
}

/// Waits until the node serves and its agent answers.
async fn serves(client: &Client) -> Result<(), CliError> {
    let (begin, mut pause) = (Instant::now(), LOOK_MS.0);
    loop {
        let why = match client.health().await {
            Ok(health) if health.ready && health.agent => return Ok(()),
            Ok(health) => health.problems.join("; "),
            Err(error) if error.retryable() || matches!(error, ClientError::Foreign { .. }) => {
                error.to_string()
            }
            Err(error) => return Err(error.into()),
        };
        if begin.elapsed() > READY_TIME {
            return Err(CliError::Vm {
                message: format!("the node does not serve after {} s: {why}", READY_TIME.as_secs()),
                suggestion: "its last lines above may say why".into(),
                code: code::TIMEOUT,
            });
        }
        tokio::time::sleep(Duration::from_millis(pause)).await;
        pause = (pause * 2).min(LOOK_MS.1);
    }
}

/// The host's name as far as it can be the name of a node.
fn node_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name = name.trim().split('.').next().unwrap_or_default().to_ascii_lowercase();
    if blixard_api::check_name(&name, false).is_ok() { name } else { "node-1".into() }
}

/// Ctrl-C and SIGTERM.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    fn new() -> Result<Self, CliError> {
        let listen = |kind| signal(kind).map_err(|e| CliError::local("cannot listen for signals", e));
        Ok(Self { interrupt: listen(SignalKind::interrupt())?, terminate: listen(SignalKind::terminate())? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}
