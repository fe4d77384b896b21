//! Exec frames between this process and the guest's init: input with backpressure, output as it comes, one exit.

use std::io;

use blixard_vmm_api::guest::WorkloadExit;
use blixard_vmm_api::guest::frame::{self, ExecRequest, Frame, NotAFrame};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;

/// Bytes of standard input that are read at once.
const INPUT_BYTES: usize = 64 << 10;

/// An exec stream that did not end with an exit.
#[derive(Debug, thiserror::Error)]
pub enum PumpError {
    /// The connection ended without saying how the command ended.
    #[error("the connection to the VM ended before the command did")]
    Lost(#[source] io::Error),
    /// What came is no frame.
    #[error("the VM sent what is no frame")]
    Frame(#[from] NotAFrame),
    /// The request is too long for a frame.
    #[error("the command and its environment are too long")]
    TooLong,
    /// The guest refused.
    #[error("the VM refused: {0}")]
    Refused(String),
    /// Output could not be written here.
    #[error("cannot write the output")]
    Output(#[source] io::Error),
}

/// Runs one exec stream to its end.
///
/// `input` is standard input (`None`: the command gets none); `events` are further frames for the guest (sizes, signals).
pub async fn pump(
    stream: impl AsyncRead + AsyncWrite,
    request: ExecRequest,
    input: Option<impl AsyncRead + Unpin>,
    mut events: mpsc::Receiver<Frame>,
    out: impl AsyncWrite + Unpin,
    err: impl AsyncWrite + Unpin,
) -> Result<WorkloadExit, PumpError> {
    let start = encode(&Frame::Start(request))?;
    let (read, mut write) = tokio::io::split(stream);
    let sending = async {
        write.write_all(&start).await?;
        write.flush().await?;
        send_input(&mut write, input, &mut events).await
    };
    let receiving = receive(read, out, err);
    tokio::pin!(sending, receiving);
    tokio::select! {
        result = &mut receiving => return result,
        // The guest reads no more (the command has ended, or the connection broke): what it said before still counts.
        _ = &mut sending => {}
    }
    receiving.await
}

async fn send_input(
    write: &mut (impl AsyncWrite + Unpin),
    mut input: Option<impl AsyncRead + Unpin>,
    events: &mut mpsc::Receiver<Frame>,
) -> io::Result<()> {
    let mut buffer = vec![0; INPUT_BYTES];
    let mut more_events = true;
    loop {
        let frame = match &mut input {
            Some(reader) => tokio::select! {
                event = events.recv(), if more_events => event,
                read = reader.read(&mut buffer) => {
                    // An input that cannot be read has ended.
                    let length = read.unwrap_or(0);
                    if length == 0 {
                        input = None;
                    }
                    Some(Frame::Stdin(buffer.get(..length).unwrap_or_default().to_vec()))
                }
            },
            None if more_events => events.recv().await,
            None => std::future::pending().await,
        };
        match frame {
            Some(frame) => {
                let bytes = encode(&frame).map_err(io::Error::other)?;
                write.write_all(&bytes).await?;
                write.flush().await?;
            }
            None => more_events = false,
        }
    }
}

async fn receive(
    mut read: impl AsyncRead + Unpin,
    mut out: impl AsyncWrite + Unpin,
    mut err: impl AsyncWrite + Unpin,
) -> Result<WorkloadExit, PumpError> {
    loop {
        let mut header = [0; frame::HEADER];
        read.read_exact(&mut header).await.map_err(PumpError::Lost)?;
        let (kind, length) = frame::decode_header(header)?;
        let mut payload = vec![0; length];
        read.read_exact(&mut payload).await.map_err(PumpError::Lost)?;
        // The guest never sends a request, so none is understood.
        match Frame::decode(kind, payload, |_| None)? {
            Frame::Stdout(bytes) => show(&mut out, &bytes).await?,
            Frame::Stderr(bytes) => show(&mut err, &bytes).await?,
            Frame::Exit(exit) => return Ok(exit),
            Frame::Refused(reason) => return Err(PumpError::Refused(reason)),
            Frame::Start(_) | Frame::Stdin(_) | Frame::Resize(..) | Frame::Signal(_) => {
                return Err(NotAFrame { kind, length: u32::try_from(length).unwrap_or(u32::MAX) }.into());
            }
        }
    }
}

async fn show(to: &mut (impl AsyncWrite + Unpin), bytes: &[u8]) -> Result<(), PumpError> {
    to.write_all(bytes).await.map_err(PumpError::Output)?;
    to.flush().await.map_err(PumpError::Output)
}

fn encode(frame: &Frame) -> Result<Vec<u8>, PumpError> {
    frame.encode(|request| serde_json::to_vec(request).ok()).ok_or(PumpError::TooLong)
}

#[cfg(test)]
mod tests;
