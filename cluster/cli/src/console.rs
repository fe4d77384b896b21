//! `logs` and `console`: what a VM writes to its serial console, and typing into it.

use std::io::IsTerminal;
use std::time::Duration;

use blixard_api::client::{ByteStream, ClientError, Stream};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::Context;
use crate::args::Logs;
use crate::error::CliError;
use crate::follow::{Subject, ended};
use crate::terminal::{DetachKeys, RawMode};

/// Pause before a log that ended before its VM is asked for again.
const AGAIN: Duration = Duration::from_millis(200);

/// How an attached console ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConsoleEnd {
    /// The VM closed it.
    Closed,
    /// The user typed the detach keys.
    Detached,
}

/// `logs`.
pub async fn logs(context: &Context, options: &Logs) -> Result<u8, CliError> {
    let stream = context.client.logs(&context.project, &options.vm.vm, options.follow, options.tail).await?;
    copy(stream, 0).await.1?;
    Ok(0)
}

/// Shows all that a VM writes until it has ended. A stream that breaks is opened again where it broke.
pub async fn follow(subject: Subject<'_>) -> Result<(), CliError> {
    let mut shown = 0;
    loop {
        let result = match subject.client.logs(subject.project, subject.name, true, None).await {
            Ok(stream) => {
                let (bytes, result) = copy(stream, shown).await;
                shown = shown.max(bytes);
                result
            }
            Err(error) => Err(error.into()),
        };
        match result {
            // Its log is not there before it has begun.
            Err(CliError::Client(error)) if matches!(error.status(), Some(404 | 409)) => {}
            Err(CliError::Client(error)) if !error.retryable() => return Err(error.into()),
            Err(error @ CliError::Output(_)) => return Err(error),
            _ => {}
        }
        if ended(&subject.client.vm(subject.project, subject.name).await?) {
            return Ok(());
        }
        tokio::time::sleep(AGAIN).await;
    }
}

/// Writes a stream to standard output but for its first `skip` bytes; answers how long it was.
async fn copy(mut stream: ByteStream, skip: usize) -> (usize, Result<(), CliError>) {
    let mut out = tokio::io::stdout();
    let mut seen = 0;
    loop {
        let bytes = match stream.next().await {
            Ok(Some(bytes)) => bytes,
            Ok(None) => return (seen, Ok(())),
            Err(error) => return (seen, Err(error.into())),
        };
        let fresh = bytes.get(skip.saturating_sub(seen)..).unwrap_or_default();
        seen += bytes.len();
        let written = async {
            out.write_all(fresh).await?;
            out.flush().await
        };
        if let Err(error) = written.await {
            return (seen, Err(CliError::Output(error)));
        }
    }
}

/// `console`.
pub async fn console(context: &Context, name: &str) -> Result<u8, CliError> {
    let stream = context.client.console(&context.project, name).await?;
    let terminal = std::io::stdin().is_terminal();
    if terminal && !context.output.quiet {
        context.output.note("Connected to the console; ctrl-p ctrl-q detaches, Enter shows a prompt.");
    }
    let raw = terminal.then(RawMode::enter).transpose()?;
    let end = attach(stream, terminal).await;
    drop(raw);
    let end = end?;
    if terminal && !context.output.quiet {
        context.output.note(match end {
            ConsoleEnd::Closed => "\nThe VM closed its console.",
            ConsoleEnd::Detached => "\nDetached; the VM goes on.",
        });
    }
    Ok(0)
}

/// Copies bytes both ways until the VM closes the console or, with `keys`, the user detaches.
pub async fn attach(stream: Stream, keys: bool) -> Result<ConsoleEnd, CliError> {
    let (mut read, mut write) = tokio::io::split(stream);
    let typing = async {
        let (mut input, mut buffer, mut detach) = (tokio::io::stdin(), vec![0; 4096], DetachKeys::default());
        loop {
            let length = input.read(&mut buffer).await.unwrap_or(0);
            let typed = buffer.get(..length).unwrap_or_default();
            let (bytes, left) = if keys { detach.feed(typed) } else { (typed.to_vec(), false) };
            let sent = async {
                write.write_all(&bytes).await?;
                write.flush().await
            };
            if sent.await.is_err() || length == 0 {
                // What the VM still says is waited for.
                return std::future::pending().await;
            }
            if left {
                return ConsoleEnd::Detached;
            }
        }
    };
    let showing = async {
        let (mut out, mut buffer) = (tokio::io::stdout(), vec![0; 16 << 10]);
        loop {
            // A console whose connection breaks has ended as well.
            let length = read.read(&mut buffer).await.unwrap_or(0);
            if length == 0 {
                return Ok(ConsoleEnd::Closed);
            }
            out.write_all(buffer.get(..length).unwrap_or_default()).await.map_err(CliError::Output)?;
            out.flush().await.map_err(CliError::Output)?;
        }
    };
    tokio::select! {
        end = typing => Ok(end),
        end = showing => end,
    }
}

/// Opens the console as soon as the VM has one.
pub async fn open_early(subject: Subject<'_>, time: Duration) -> Result<Option<Stream>, CliError> {
    let began = ["starting", "running", "stopping", "stopped", "failed"];
    let view = subject.wait(&began, Some(time)).await?;
    if ended(&view) {
        return Ok(None);
    }
    match subject.client.console(subject.project, subject.name).await {
        Ok(stream) => Ok(Some(stream)),
        Err(error @ ClientError::Refused(_)) => {
            // It may have ended in between.
            let view = subject.client.vm(subject.project, subject.name).await?;
            if ended(&view) { Ok(None) } else { Err(error.into()) }
        }
        Err(error) => Err(error.into()),
    }
}
