// A PM2 app that logs: LINES_PER_SECOND lines a second, for as long as it lives.
'use strict';

const rate = Number(process.env.LINES_PER_SECOND);
let count = 0;
setInterval(() => {
  let text = '';
  for (let line = 0; line < rate / 20; line += 1) text += `GET /api/words/${(count += 1)} 200 12.5 ms - request served\n`;
  process.stdout.write(text);
}, 50);
