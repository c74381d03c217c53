// Moves money between accounts and makes garbage while the event loop is idle.
const fs = require('fs');
let accounts = Array.from({ length: 1000 }, () => ({ balance: 100 }));
const garbage = [];
function work() {
  for (let i = 0; i < 2000; i++) {
    const a = Math.floor(Math.random() * 1000), b = Math.floor(Math.random() * 1000);
    accounts[a] = { balance: accounts[a].balance - 1 };
    accounts[b] = { balance: accounts[b].balance + 1 };
    garbage[i % 500] = new Array(50).fill(i).map(String);
  }
  setImmediate(work);
}
work();
let tick = 0;
setInterval(() => {
  const sum = accounts.reduce((sum, account) => sum + account.balance, 0);
  if (sum !== 100000) { fs.writeSync(1, `WRONG sum ${sum}\n`); process.exit(3); }
  fs.writeSync(1, `tick ${++tick}\n`);
}, 100);
