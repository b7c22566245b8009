//! What a person sees: lines as things happen, and on a terminal a progress
//! bar below them. Without a terminal there are only the lines.

use std::{
    io::IsTerminal,
    time::{Duration, Instant},
};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

pub struct Screen {
    started: Instant,
    bars: Option<Bars>,
    colour: bool,
}

struct Bars {
    all: MultiProgress,
    images: ProgressBar,
    cluster: ProgressBar,
    stages: ProgressBar,
}

impl Screen {
    pub fn new() -> Self {
        let terminal = std::io::stdout().is_terminal();
        let colour = terminal && std::env::var_os("NO_COLOR").is_none();
        Self {
            started: Instant::now(),
            bars: terminal.then(Bars::new),
            colour,
        }
    }

    /// A line with the time since the start and who it is from.
    pub fn line(&self, who: &str, text: &str) {
        let seconds = self.started.elapsed().as_secs_f64();
        if self.colour {
            self.print(&format!(
                "\x1b[2m{seconds:6.1} s\x1b[0m  \x1b[36m{who:<8}\x1b[0m {text}"
            ));
        } else {
            self.print(&format!("{seconds:6.1} s  {who:<8} {text}"));
        }
    }

    pub fn note(&self, text: &str) {
        self.line("demo", text);
    }

    pub fn loud(&self, lines: &[String]) {
        let width = lines
            .iter()
            .map(|line| line.chars().count())
            .max()
            .unwrap_or(0);
        let rule = "!".repeat(width + 6);
        let (on, off) = if self.colour {
            ("\x1b[1;33m", "\x1b[0m")
        } else {
            ("", "")
        };
        self.print(&format!("{on}{rule}{off}"));
        for line in lines {
            let padding = " ".repeat(width - line.chars().count());
            self.print(&format!("{on}!! {line}{padding} !!{off}"));
        }
        self.print(&format!("{on}{rule}{off}"));
    }

    pub fn print(&self, text: &str) {
        match &self.bars {
            // Above the bars, which are drawn again below it.
            Some(bars) if self.has_bars() => {
                let _ = bars.all.println(text);
            }
            _ => println!("{text}"),
        }
    }

    pub fn has_bars(&self) -> bool {
        self.bars
            .as_ref()
            .is_some_and(|bars| !bars.images.is_finished())
    }

    pub fn progress(&self, settled: usize, total: usize, cluster: &str, stages: &str) {
        if let Some(bars) = &self.bars {
            bars.images.set_length(total as u64);
            bars.images.set_position(settled as u64);
            bars.cluster.set_message(cluster.to_owned());
            bars.stages.set_message(stages.to_owned());
        }
    }

    /// The work is over: the bars go.
    pub fn finish(&self) {
        if let Some(bars) = &self.bars {
            bars.images.finish_and_clear();
            bars.cluster.finish_and_clear();
            bars.stages.finish_and_clear();
        }
    }

    /// Columns of the terminal; none without one.
    pub fn columns(&self) -> Option<usize> {
        self.bars.as_ref()?;
        let size = rustix::termios::tcgetwinsize(std::io::stdout()).ok()?;
        Some(usize::from(size.ws_col)).filter(|columns| *columns > 0)
    }
}

impl Bars {
    fn new() -> Self {
        let all = MultiProgress::with_draw_target(indicatif::ProgressDrawTarget::stdout());
        let images = all.add(ProgressBar::new(0));
        let cluster = all.add(ProgressBar::new_spinner());
        let stages = all.add(ProgressBar::new_spinner());
        if let Ok(style) =
            ProgressStyle::with_template("{elapsed:>8}  [{bar:32.cyan}] {pos}/{len} images settled")
        {
            images.set_style(style.progress_chars("=> "));
        }
        if let Ok(style) = ProgressStyle::with_template("       {spinner}  {wide_msg}") {
            cluster.set_style(style);
        }
        if let Ok(style) = ProgressStyle::with_template("          {wide_msg}") {
            stages.set_style(style);
        }
        cluster.enable_steady_tick(Duration::from_millis(120));
        Self {
            all,
            images,
            cluster,
            stages,
        }
    }
}

/// Columns, aligned; the last may be cut to the terminal's width.
pub fn table(head: &[&str], rows: &[Vec<String>], columns: Option<usize>) -> Vec<String> {
    let mut widths: Vec<usize> = head.iter().map(|cell| cell.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let render = |cells: &[String]| {
        let mut line = String::new();
        for (index, (cell, width)) in cells.iter().zip(&widths).enumerate() {
            if index > 0 {
                line.push_str("  ");
            }
            line.push_str(cell);
            if index + 1 < cells.len() {
                line.push_str(&" ".repeat(width - cell.chars().count()));
            }
        }
        match columns {
            Some(columns) if line.chars().count() > columns && columns > 1 => {
                line.chars().take(columns - 1).chain(['…']).collect()
            }
            _ => line,
        }
    };
    let head: Vec<String> = head.iter().map(|cell| (*cell).to_owned()).collect();
    let rule: Vec<String> = widths.iter().map(|width| "-".repeat(*width)).collect();
    let mut lines = vec![render(&head), render(&rule)];
    lines.extend(rows.iter().map(|row| render(row)));
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_cut() {
        let rows = vec![
            vec!["é.jpg".to_owned(), "512".to_owned()],
            vec!["long name.png".to_owned(), "-".to_owned()],
        ];
        let lines = table(&["object", "n"], &rows, None);
        assert_eq!(
            lines,
            [
                "object         n",
                "-------------  ---",
                "é.jpg          512",
                "long name.png  -"
            ]
        );
        assert_eq!(table(&["object", "n"], &rows, Some(8))[3], "long na…");
    }
}
