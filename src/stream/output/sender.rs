//! The thread that sends what leaves, and makes room for those who wait.

use std::io::{self, IoSlice};
use std::sync::Arc;

use super::change::Attempt;
use super::{Core, Late, Outlet, Output, State, answer_all};
use crate::host::errno;
use crate::stream::runs::Written;
use crate::stream::store::Part;
use crate::stream::window::Leaving;

/// Data given to the sink at a time: the largest pipe of an unprivileged user.
const BATCH: u64 = 1 << 20;

/// What the sender does next.
enum Step {
    Run(Leaving, Vec<Part>),
    Late(u64, Late),
    Finish(u64),
    Abort,
    /// The store cannot give back what it holds.
    Broken(io::Error),
    /// Nobody is there to take the rest.
    Gone(String),
}

impl Output {
    /// The sender's thread.
    pub(super) fn send(self: &Arc<Self>, mut outlet: Box<dyn Outlet>) {
        match outlet.prepare() {
            Ok(()) => {
                // Not held by its own sink: who watches that ends with it.
                let output = Arc::downgrade(self);
                outlet.watch(Box::new(move |trouble| {
                    if let Some(output) = output.upgrade() {
                        output.hear(trouble);
                    }
                }));
            }
            Err(error) => self.sink_failed(&*outlet, &error),
        }
        loop {
            let sent = match self.next() {
                Step::Run(Leaving { range, written }, parts) => {
                    let sent = match written {
                        Some(Written::Data) => {
                            let parts: Vec<_> =
                                parts.iter().map(|part| IoSlice::new(part.bytes())).collect();
                            outlet.data(range.start, &parts)
                        }
                        Some(Written::Zeros) => outlet.zeros(range.clone()),
                        None => outlet.hole(range.clone()),
                    };
                    drop(parts);
                    sent.map(|()| self.accepted(Some(range.end), 0))
                }
                Step::Late(offset, late) => {
                    let sent = match &late {
                        Late::Data(bytes) => outlet.data(offset, &[IoSlice::new(bytes)]),
                        Late::Zeros(len) => outlet.zeros(offset..offset + len),
                        Late::Hole(len) => outlet.hole(offset..offset + len),
                    };
                    sent.map(|()| self.accepted(None, late.cost()))
                }
                Step::Broken(error) => {
                    self.give_up_on(format!("its spill cannot be read: {error}"));
                    Ok(())
                }
                Step::Gone(why) => {
                    self.give_up_on(why);
                    Ok(())
                }
                Step::Finish(end) => {
                    let result = outlet.finish(end);
                    return self.ended(Some(result));
                }
                Step::Abort => {
                    outlet.abort();
                    return self.ended(None);
                }
            };
            if let Err(error) = sent {
                self.sink_failed(&*outlet, &error);
            }
        }
    }

    fn sink_failed(&self, outlet: &dyn Outlet, error: &io::Error) {
        self.give_up_on(outlet.explain(error));
    }

    fn give_up_on(&self, why: String) {
        let mut core = self.core.lock();
        self.fail(&mut core, why);
        let refused = self.refused(&mut core);
        drop(core);
        answer_all(refused, libc::EIO);
    }

    /// Waits for something to do.
    fn next(&self) -> Step {
        let mut core = self.core.lock();
        loop {
            match core.state {
                State::Failed | State::Aborted => return Step::Abort,
                State::Open | State::Finishing | State::Finished => {}
            }
            if let Some((offset, late)) = core.late.pop_front() {
                return Step::Late(offset, late);
            }
            if let Some(leaving) = core.window.take(BATCH) {
                if leaving.written != Some(Written::Data) {
                    return Step::Run(leaving, Vec::new());
                }
                return match core.store.parts(leaving.range.clone()) {
                    Ok(parts) => Step::Run(leaving, parts),
                    Err(error) => Step::Broken(error),
                };
            }
            if core.state == State::Finishing {
                return Step::Finish(self.end_of(&core));
            }
            // Everything has left that can; what cannot yet, nobody is there for.
            if core.gone.is_some() && (self.rewrites || self.watch.accepted() < self.end_of(&core))
            {
                return Step::Gone(core.gone.take().unwrap_or_default());
            }
            self.work.wait(&mut core);
        }
    }

    /// The sink has taken what came before `to`, and `late` bytes of later records: there may be
    /// room for those who wait.
    fn accepted(&self, to: Option<u64>, late: u64) {
        let mut core = self.core.lock();
        core.late_bytes -= late;
        if let Some(to) = to {
            core.window.accepted(to);
        }
        let keep = core.window.sent().min(core.window.frontier().saturating_sub(self.read_window));
        if keep > core.dropped {
            let from = core.dropped;
            core.store.drop_before(from, keep);
            core.dropped = keep;
        }
        let mut done = Vec::new();
        while let Some((offset, bytes)) = self.first_that_may_fit(&core) {
            let attempt = match &bytes {
                Ok(bytes) => self.attempt(&mut core, offset, bytes),
                Err(_) => Attempt::Done(Err(errno(libc::EIO))),
            };
            match attempt {
                Attempt::NoRoom => break,
                Attempt::Done(result) => {
                    done.extend(core.queue.pop().map(|waiting| (waiting.reply, result)));
                }
            }
        }
        let refused = self.refused(&mut core);
        drop(core);
        for (reply, result) in done {
            reply(result);
        }
        answer_all(refused, libc::EIO);
    }

    /// The oldest write that waits, unless it is plain that there is no room for it.
    fn first_that_may_fit(&self, core: &Core) -> Option<(u64, io::Result<Vec<u8>>)> {
        let len = core.queue.first_len()? as u64;
        if self.has_room(core, len) { core.queue.first() } else { None }
    }

    fn ended(&self, result: Option<Result<(), String>>) {
        let mut core = self.core.lock();
        core.ended = true;
        match result {
            Some(Ok(())) if core.state == State::Finishing => core.state = State::Finished,
            Some(Err(why)) => self.fail(&mut core, why),
            Some(Ok(())) | None => {}
        }
        let refused = self.refused(&mut core);
        self.changed.notify_all();
        drop(core);
        answer_all(refused, libc::EIO);
    }
}
