//! The thread that sends data to the sink and makes room for waiting writes.

use std::io::{self, IoSlice};
use std::sync::Arc;

use super::writes::WriteOutcome;
use super::{Output, OutputCore, OutputState, Rewrite, Sink, reply_all};
use crate::stream::page_store::PageBytes;
use crate::stream::queue::WriteSource;
use crate::stream::runs::Written;
use crate::stream::window::OutgoingRun;

/// The most bytes of data given to the sink at a time: 1 MiB, the largest pipe of an unprivileged
/// user.
const SEND_BATCH: u64 = 1 << 20;

/// The sender's next action.
enum SenderStep {
    SendRun(OutgoingRun, Vec<PageBytes>),
    Rewrite(u64, Rewrite),
    Finish(u64),
    Abort,
    /// The store cannot return its data.
    StoreFailed(io::Error),
    /// The sink is gone and cannot take the rest.
    SinkGone(String),
}

impl Output {
    /// Runs the sender's thread.
    pub(super) fn run_sender(self: &Arc<Self>, mut sink: Box<dyn Sink>) {
        match sink.prepare() {
            Ok(()) => {
                // A weak reference: the sink must not keep the stream alive, and its watcher ends
                // with it.
                let output = Arc::downgrade(self);
                sink.watch(Box::new(move |event| {
                    if let Some(output) = output.upgrade() {
                        output.on_sink_event(event);
                    }
                }));
            }
            Err(error) => self.sink_failed(&*sink, &error),
        }
        loop {
            let sent = match self.next_step() {
                SenderStep::SendRun(OutgoingRun { range, written }, parts) => {
                    let sent = match written {
                        Some(Written::Data) => {
                            let parts: Vec<_> =
                                parts.iter().map(|part| IoSlice::new(part.bytes())).collect();
                            sink.send_data(range.start, &parts)
                        }
                        Some(Written::Zeros) => sink.send_zeros(range.clone()),
                        None => sink.send_hole(range.clone()),
                    };
                    drop(parts);
                    sent.map(|()| self.on_accepted(Some(range.end), 0))
                }
                SenderStep::Rewrite(offset, rewrite) => {
                    let sent = match &rewrite {
                        Rewrite::Data(bytes) => sink.send_data(offset, &[IoSlice::new(bytes)]),
                        Rewrite::Zeros(len) => sink.send_zeros(offset..offset + len),
                        Rewrite::Hole(len) => sink.send_hole(offset..offset + len),
                    };
                    sent.map(|()| self.on_accepted(None, rewrite.cost()))
                }
                SenderStep::StoreFailed(error) => {
                    self.fail_stream(format!("its spill cannot be read: {error}"));
                    Ok(())
                }
                SenderStep::SinkGone(why) => {
                    self.fail_stream(why);
                    Ok(())
                }
                SenderStep::Finish(end) => {
                    let result = sink.finish(end);
                    return self.end_sender(Some(result));
                }
                SenderStep::Abort => {
                    sink.abort();
                    return self.end_sender(None);
                }
            };
            if let Err(error) = sent {
                self.sink_failed(&*sink, &error);
            }
        }
    }

    fn sink_failed(&self, sink: &dyn Sink, error: &io::Error) {
        self.fail_stream(sink.explain(error));
    }

    fn fail_stream(&self, why: String) {
        let mut core = self.core.lock();
        self.fail(&mut core, why);
        let refused = self.take_refused(&mut core);
        drop(core);
        reply_all(refused, libc::EIO);
    }

    /// Waits for work and returns the next step.
    fn next_step(&self) -> SenderStep {
        let mut core = self.core.lock();
        loop {
            match core.state {
                OutputState::Failed | OutputState::Aborted => return SenderStep::Abort,
                OutputState::Open | OutputState::Finishing | OutputState::Finished => {}
            }
            if let Some((offset, rewrite)) = core.rewrites.pop_front() {
                return SenderStep::Rewrite(offset, rewrite);
            }
            if let Some(run) = core.window.take_next(SEND_BATCH) {
                if run.written != Some(Written::Data) {
                    return SenderStep::SendRun(run, Vec::new());
                }
                return match core.pages.parts(run.range.clone()) {
                    Ok(parts) => SenderStep::SendRun(run, parts),
                    Err(error) => SenderStep::StoreFailed(error),
                };
            }
            if core.state == OutputState::Finishing {
                return SenderStep::Finish(self.end_offset(&core));
            }
            // All data that may be sent has been sent, and the sink is gone before the rest.
            if core.sink_gone.is_some()
                && (self.can_rewrite || self.monitor.accepted() < self.end_offset(&core))
            {
                return SenderStep::SinkGone(core.sink_gone.take().unwrap_or_default());
            }
            self.work.wait(&mut core);
        }
    }

    /// Handles data accepted by the sink: everything before `to`, and rewrites that cost
    /// `rewrite_bytes`. There may be room for waiting writes now.
    fn on_accepted(&self, to: Option<u64>, rewrite_bytes: u64) {
        let mut core = self.core.lock();
        core.rewrite_bytes -= rewrite_bytes;
        if let Some(to) = to {
            core.window.mark_accepted(to);
        }
        let keep =
            core.window.accepted().min(core.window.frontier().saturating_sub(self.read_window));
        if keep > core.dropped_end {
            let from = core.dropped_end;
            core.pages.drop_before(from, keep);
            core.dropped_end = keep;
        }
        let mut done = Vec::new();
        while let Some((offset, source, bytes)) = self.first_fitting(&core) {
            let attempt = match bytes {
                Ok(bytes) => self.try_write(&mut core, offset, &bytes, source),
                Err(error) => {
                    let len = core.queue.first_len().unwrap_or(0) as u64;
                    self.note_refused(&mut core, offset..offset + len, source, &error);
                    WriteOutcome::Done(Err(error))
                }
            };
            match attempt {
                WriteOutcome::NoRoom => break,
                WriteOutcome::Done(result) => {
                    done.extend(core.queue.pop().map(|waiting| (waiting.reply, result)));
                }
            }
        }
        let refused = self.take_refused(&mut core);
        drop(core);
        for (reply, result) in done {
            reply(result);
        }
        reply_all(refused, libc::EIO);
    }

    /// Returns the oldest waiting write, unless there is certainly no room for it.
    fn first_fitting(&self, core: &OutputCore) -> Option<(u64, WriteSource, io::Result<Vec<u8>>)> {
        let len = core.queue.first_len()? as u64;
        if self.has_room(core, len) { core.queue.first() } else { None }
    }

    fn end_sender(&self, result: Option<Result<(), String>>) {
        let mut core = self.core.lock();
        core.sender_ended = true;
        match result {
            Some(Ok(())) if core.state == OutputState::Finishing => {
                core.state = OutputState::Finished;
            }
            Some(Err(why)) => self.fail(&mut core, why),
            Some(Ok(())) | None => {}
        }
        let refused = self.take_refused(&mut core);
        self.changed.notify_all();
        drop(core);
        reply_all(refused, libc::EIO);
    }
}
