//! `exec`: a command inside a VM, its streams, terminal, signals and exit code.

use std::time::Duration;

use blixard_api::client::Stream;
use blixard_api::vm::Phase;
use blixard_vmm_api::guest::Command;
use blixard_vmm_api::guest::frame::{ExecRequest, Frame};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use crate::Context;
use crate::args::Exec;
use crate::error::CliError;
use crate::follow::Subject;
use crate::progress::Progress;
use crate::pump::{PumpError, pump};
use crate::terminal::{self, RawMode};

/// A VM that is still starting is waited for this long.
const READY_TIME: Duration = Duration::from_secs(60);

/// `exec`.
pub async fn exec(context: &Context, options: Exec) -> Result<u8, CliError> {
    let command = Command {
        args: options.command,
        env: options.env.into_iter().collect(),
        cwd: options.workdir,
        user: options.user,
    };
    command.validate("command").map_err(|error| CliError::Usage {
        message: error.to_string(),
        suggestion: "blixard exec --help".into(),
    })?;
    let subject = Subject { client: &context.client, project: &context.project, name: &options.vm.vm };
    let stream = open(context, subject).await?;
    let raw = options.tty.then(RawMode::enter).transpose()?;
    let request = ExecRequest {
        command,
        terminal: options.tty.then(terminal::size),
        stdin: options.interactive || options.tty,
    };
    let (send, events) = mpsc::channel(16);
    let listener =
        tokio::spawn(async move { if options.tty { sizes(send).await } else { signals(send).await } });
    let input = request.stdin.then(tokio::io::stdin);
    let result = pump(stream, request, input, events, tokio::io::stdout(), tokio::io::stderr()).await;
    listener.abort();
    drop(raw);
    match result {
        Ok(exit) => Ok(exit.shell_code()),
        Err(PumpError::Output(error)) => Err(CliError::Own(Box::new(CliError::Output(error)))),
        Err(error) => Err(CliError::Own(Box::new(lost(subject, error).await))),
    }
}

/// Opens the stream; a VM that is on its way is waited for.
async fn open(context: &Context, subject: Subject<'_>) -> Result<Stream, CliError> {
    let error = match subject.client.exec(subject.project, subject.name).await {
        Ok(stream) => return Ok(stream),
        Err(error) => error,
    };
    if !matches!(error.status(), Some(409 | 503)) {
        return Err(error.into());
    }
    let view = subject.client.vm(subject.project, subject.name).await?;
    if !matches!(view.phase, Phase::Pending | Phase::Preparing | Phase::Starting) {
        return Err(error.into());
    }
    let progress = Progress::start(context.output, &format!("waiting for {}", view.name));
    subject.wait_ready(READY_TIME, &progress).await?;
    drop(progress);
    Ok(subject.client.exec(subject.project, subject.name).await?)
}

/// Why a stream ended without an exit, as far as the VM tells.
async fn lost(subject: Subject<'_>, error: PumpError) -> CliError {
    let cause = match std::error::Error::source(&error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    };
    let now = match subject.client.vm(subject.project, subject.name).await {
        Ok(view) => format!(" (the VM is {})", view.phase),
        Err(_) => String::new(),
    };
    CliError::Vm {
        message: format!("{cause}{now}"),
        suggestion: format!("blixard logs {0}; blixard inspect {0}", subject.name),
        code: crate::error::code::OWN,
    }
}

/// Tells the guest each new size of the terminal.
async fn sizes(events: mpsc::Sender<Frame>) {
    let Ok(mut changes) = signal(SignalKind::window_change()) else { return };
    while changes.recv().await.is_some() {
        let (columns, rows) = terminal::size();
        if events.send(Frame::Resize(columns, rows)).await.is_err() {
            return;
        }
    }
}

/// Hands signals on to the command.
async fn signals(events: mpsc::Sender<Frame>) {
    let kinds = [
        SignalKind::interrupt(),
        SignalKind::terminate(),
        SignalKind::hangup(),
        SignalKind::quit(),
        SignalKind::user_defined1(),
        SignalKind::user_defined2(),
    ];
    let forward = |kind: SignalKind| {
        let events = events.clone();
        async move {
            let (Ok(mut seen), Ok(number)) = (signal(kind), u8::try_from(kind.as_raw_value())) else {
                return;
            };
            while seen.recv().await.is_some() {
                if events.send(Frame::Signal(number)).await.is_err() {
                    return;
                }
            }
        }
    };
    futures::future::join_all(kinds.map(forward)).await;
}
